"""The communicator between patches: the only module of the package that touches collectives.

Every collective is asynchronous, has a timeout that names rank, layer and step, and is counted where it is sent:
from the tensor that is handed to it.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from otil_xdit.watch import ExchangeTimeout as ExchangeTimeout
from otil_xdit.watch import Watch

T = TypeVar("T")

Neighbours = tuple[torch.Tensor, torch.Tensor]
"""What the rank before and the rank after this one send."""

Shares = Mapping[str, int]
"""The bytes of one message by the counters that they go to; the message itself counts where most of its bytes do."""

Transfer = tuple[Callable[..., Any], torch.Tensor, int]
"""`dist.isend` or `dist.irecv`, what is sent or filled, and the other rank's place in the group."""

_NEVER_SENT = 2**20 + 1
"""A tag that no message has."""

# torch 2.13 renamed the collective and warns under the old name; older versions know only that.
_all_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class PatchGroup:
    """The ranks that hold the patches of one image, in the order of the patches.

    Attributes:
        process_group: what the collectives run on.
        rank: this process's place in the group, which is its patch.
        world_size: number of patches.
        ulysses_degree: ranks that share a patch's heads; a patch's sequence is that many rows' chunks in turn.
        rows: the ranks that hold rows (patch x Ulysses), in the order of the rows; None where nobody needs them.
        replica: all ranks that work on the image (rows x CFG); None where nobody needs them.
        watch: knows who failed when a wait does; None for nobody.
    """

    process_group: dist.ProcessGroup
    rank: int
    world_size: int
    ulysses_degree: int = 1
    rows: PatchGroup | None = None
    replica: PatchGroup | None = None
    watch: Watch | None = None


@dataclass
class Traffic:
    """What one rank handed to collectives and how long it waited for them, by kind of message.

    `sent` holds bytes of this rank's payloads; an all-gather delivers each of them to world_size - 1 receivers.
    """

    sent: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    waited: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def clear(self) -> None:
        for counter in (self.sent, self.messages, self.waited):
            counter.clear()


class Pending(Generic[T]):
    """Messages under way; `wait` gives what they bring."""

    def __init__(self, exchange: Exchange, works: list[dist.Work], output: T, kind: str, where: str) -> None:
        self._exchange, self._works, self._output = exchange, works, output
        self._kind, self._where = kind, where

    def wait(self) -> T:
        """What was received; on CUDA the current stream waits, on the CPU this thread does.

        Raises:
            ExchangeTimeout: naming the rank, the layer and the step.
        """
        started = time.perf_counter()
        exchange, watch = self._exchange, self._exchange.group.watch
        if watch is not None:
            watch.waiting = True
        try:
            for work in self._works:
                exchange.wait_for(work)
        except RuntimeError as error:
            raise exchange.timed_out(self._where, error) from error
        if watch is not None:
            watch.waiting = False
        exchange.traffic.waited[self._kind] += time.perf_counter() - started
        return self._output


class Exchange:
    """Collectives over one group of ranks, with counters and timeouts.

    Args:
        group: the ranks.
        timeout: seconds that one wait may take.
        traffic: counters to share with another exchange; None for its own.
    """

    def __init__(self, group: PatchGroup, timeout: float, traffic: Traffic | None = None) -> None:
        self.group = group
        self.traffic = Traffic() if traffic is None else traffic
        self._timeout = timeout
        self._host_waits = self._waits_on_host()

    def all_gather(self, payload: torch.Tensor, output: torch.Tensor, kind: str, where: str) -> Pending[torch.Tensor]:
        """Start sending `payload` to every rank of the group.

        Args:
            payload: contiguous, same shape and dtype on every rank; must stay unchanged until the wait.
            output: [N, *payload.shape], contiguous; filled by the wait.
            kind: the counter that the bytes go to.
            where: "layer ... at step ..." for error messages.

        Every rank of the group must reach this call in the same order, so no caller may skip it on a condition that
        differs between ranks.
        """
        assert payload.is_contiguous() and output.is_contiguous(), f"{where}: collectives need contiguous tensors"
        self._count({kind: payload.nbytes})
        self._tell(where)
        try:
            works = self._start_gather(payload.view(-1), output.view(-1))
        except RuntimeError as error:
            raise self.timed_out(where, error) from error
        return Pending(self, works, output, kind, where)

    def neighbours(
        self,
        to_previous: torch.Tensor,
        to_next: torch.Tensor,
        output: Neighbours,
        shares: tuple[Shares, Shares],
        where: str,
    ) -> Pending[Neighbours]:
        """Start sending to the ranks before and after this one in the group; the ends have one neighbour.

        Args:
            to_previous, to_next: contiguous; unchanged until the wait. Empty ones are not sent; whoever sends an empty
                one must be expected to: the sizes follow from the layer, alike on every rank.
            output: what the two send, filled by the wait.
            shares: of the bytes of the two messages.
            where: as in `all_gather`.
        """
        rank, ranks = self.group.rank, self.group.world_size
        sends: list[Transfer] = []
        receives: list[Transfer] = []
        sides = ((rank - 1, to_previous, output[0]), (rank + 1, to_next, output[1]))
        for (peer, sent, received), bytes_of in zip(sides, shares, strict=True):
            if not 0 <= peer < ranks:
                continue
            if sent.numel():
                assert sum(bytes_of.values()) == sent.nbytes, f"{where}: every byte that is sent is counted"
                sends.append((dist.isend, sent, peer))
                self._count(bytes_of)
            if received.numel():
                receives.append((dist.irecv, received, peer))
        self._tell(where)
        try:
            works = self._start_transfers(receives, sends)
        except RuntimeError as error:
            raise self.timed_out(where, error) from error
        return Pending(self, works, output, _most(shares[0]) or _most(shares[1]), where)

    def send(self, payload: torch.Tensor, peer: int, kind: str, where: str) -> Pending[torch.Tensor]:
        """Start sending `payload`, contiguous and unchanged until the wait, to one rank of the group, which `receive`s.

        Args:
            peer: its place in the group.
            kind, where: as in `all_gather`.
        """
        self._count({kind: payload.nbytes})
        return self._one_way([], [(dist.isend, payload, peer)], payload, kind, where)

    def receive(self, output: torch.Tensor, peer: int, kind: str, where: str) -> Pending[torch.Tensor]:
        """Start receiving what the rank `peer` of the group `send`s: of the shape and dtype of `output`, contiguous."""
        return self._one_way([(dist.irecv, output, peer)], [], output, kind, where)

    def _one_way(
        self, receives: list[Transfer], sends: list[Transfer], tensor: torch.Tensor, kind: str, where: str
    ) -> Pending[torch.Tensor]:
        self._tell(where)
        try:
            works = self._start_transfers(receives, sends)
        except RuntimeError as error:
            raise self.timed_out(where, error) from error
        return Pending(self, works, tensor, kind, where)

    # What reaches the process group; the planner (otil_xdit.planner.recorder) has others here.

    def _waits_on_host(self) -> bool:
        # gloo waits on the host and takes a deadline per wait. NCCL's wait only queues a dependency on the stream;
        # given a deadline it would block the host in every layer, so there the process group's own timeout rules.
        return bool(dist.get_backend(self.group.process_group) == "gloo")

    def _start_gather(self, payload: torch.Tensor, output: torch.Tensor) -> list[dist.Work]:
        group = self.group
        if not self._host_waits:
            return [_all_gather_flat(output, payload, group=group.process_group, async_op=True)]
        # gloo's own all-gather is a ring, whose every round waits for the slowest link in both directions in turn.
        # Straight to everybody the same bytes use 93% of a shaped link instead of 60 to 80%.
        parts = output.view(group.world_size, -1)
        parts[group.rank].copy_(payload)
        ahead = [(group.rank + distance) % group.world_size for distance in range(1, group.world_size)]
        receives: list[Transfer] = [(dist.irecv, parts[peer], peer) for peer in reversed(ahead)]
        return self._start_transfers(receives, [(dist.isend, payload, peer) for peer in ahead])

    def _start_transfers(self, receives: list[Transfer], sends: list[Transfer]) -> list[dist.Work]:
        # Receives first: gloo tells the sender that there is room, and where a message of this rank is on its way
        # already, that notice queues behind it, and the two directions of a link take turns.
        if not receives and not sends:
            return []
        group = self.group.process_group
        return dist.batch_isend_irecv(
            [dist.P2POp(way, tensor, group=group, group_peer=peer) for way, tensor, peer in (*receives, *sends)]
        )

    def wait_for(self, work: dist.Work) -> None:
        if self._host_waits:
            work.wait(timedelta(seconds=self._timeout))
        else:
            work.wait()

    def _count(self, shares: Shares) -> None:
        """Count one message."""
        for kind, size in shares.items():
            self.traffic.sent[kind] += size
        self.traffic.messages[_most(shares)] += 1

    def _tell(self, where: str) -> None:
        if self.group.watch is not None:
            self.group.watch.begun(where)

    def timed_out(self, where: str, error: BaseException) -> ExchangeTimeout:
        """What to raise for a collective's own error: with rank, layer and step, and who is to blame."""
        watch = self.group.watch
        reason = reason_of(error)
        if watch is None:
            me, blamed = f"rank {self.group.rank} of {self.group.world_size}", f"({reason})"
        else:
            me, blamed = f"rank {watch.rank} of {dist.get_world_size()}", f"({reason}); {watch.blame()}"
        return ExchangeTimeout(
            f"{me}: no answer from the other patches for {where} within {self._timeout:g} s {blamed}"
        )


def reason_of(error: BaseException) -> str:
    """The gist of a collective's error: its first sentence, without the place in torch's sources."""
    return re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0]).partition(". ")[0]


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective of anybody's failed because of another rank, by what gloo, NCCL and torch say then."""
    return any(sign in str(error) for sign in ("/gloo/", "Application timeout", "Operation timed out", "NCCL"))


def break_connections(groups: Iterable[dist.ProcessGroup]) -> None:
    """End every wait on these groups at once, on this rank and on those that it is connected to.

    gloo has no call for that. A wait for a message that runs into its own timeout closes all connections of its
    group, so one is made to. NCCL's abort ends what this rank has under way; the others must do the same.
    """
    for group in groups:
        with suppress(RuntimeError):
            if dist.get_backend(group) == "gloo":
                other = dist.get_global_rank(group, (dist.get_rank(group) + 1) % dist.get_world_size(group))
                never = dist.irecv(torch.zeros(1), other, group, _NEVER_SENT)
                assert never is not None, "this rank is in the group"
                never.wait(timedelta(milliseconds=1))
            elif hasattr(group, "abort"):
                group.abort()


def limit_waits(groups: Iterable[dist.ProcessGroup], seconds: float) -> None:
    """Give every collective of these groups a timeout, those too that others start; idle groups are not concerned."""
    for group in groups:
        set_timeout = getattr(distributed_c10d, "_set_pg_timeout", None)  # torch has no public way
        if set_timeout is not None:
            set_timeout(timedelta(seconds=seconds), group)


def _most(shares: Shares) -> str:
    """The counter of most bytes."""
    return max(shares, key=lambda kind: shares[kind], default="")
