"""The communicator between patches: the only module of the package that touches collectives.

Every collective is asynchronous, has a timeout that names rank, layer and step, and is counted where it is sent:
from the tensor that is handed to it.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from otil_xdit.comm.groups import PatchGroup, reason_of
from otil_xdit.errors import ExchangeTimeout

T = TypeVar("T")

Neighbours = tuple[torch.Tensor, torch.Tensor]
"""What the rank before and the rank after this one send."""

Shares = Mapping[str, int]
"""The bytes of one message by the counters that they go to; the message itself counts where most of its bytes do."""

Transfer = tuple[Callable[..., Any], torch.Tensor, int]
"""`dist.isend` or `dist.irecv`, what is sent or filled, and the other rank's place in the group."""


# torch 2.13 renamed the collective and warns under the old name; older versions know only that.
_all_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


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

    def __init__(self, collectives: Collectives, works: list[dist.Work], output: T, kind: str, where: str) -> None:
        self._collectives, self._works, self._output = collectives, works, output
        self._kind, self._where = kind, where

    def wait(self) -> T:
        """What was received; on CUDA the current stream waits, on the CPU this thread does.

        Raises:
            ExchangeTimeout: naming the rank, the layer and the step.
        """
        started = time.perf_counter()
        collectives, detector = self._collectives, self._collectives.group.detector
        if detector is not None:
            detector.waiting = True
        try:
            for work in self._works:
                collectives.wait_for(work)
        except RuntimeError as error:
            raise collectives.timed_out(self._where, error) from error
        if detector is not None:
            detector.waiting = False
        collectives.traffic.waited[self._kind] += time.perf_counter() - started
        return self._output


class Collectives:
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

    # What reaches the process group; the planner (otil_xdit.dryrun.recorder) has others here.

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
        if self.group.detector is not None:
            self.group.detector.on_collective(where)

    def timed_out(self, where: str, error: BaseException) -> ExchangeTimeout:
        """What to raise for a collective's own error: with rank, layer and step, and who is to blame."""
        detector = self.group.detector
        reason = reason_of(error)
        if detector is None:
            me, blamed = f"rank {self.group.rank} of {self.group.world_size}", f"({reason})"
        else:
            me, blamed = f"rank {detector.rank} of {dist.get_world_size()}", f"({reason}); {detector.diagnose()}"
        return ExchangeTimeout(
            f"{me}: no answer from the other patches for {where} within {self._timeout:g} s {blamed}"
        )


def _most(shares: Shares) -> str:
    """The counter of most bytes."""
    return max(shares, key=lambda kind: shares[kind], default="")
