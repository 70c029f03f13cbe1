"""The only module of the package that touches collectives.

Every collective is asynchronous, has a timeout whose error names rank, layer and step, and is counted where it is sent:
from the tensor that is handed to it.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from otil_xdit.comm.device_times import DeviceTimes
from otil_xdit.comm.groups import PatchGroup, reason_of
from otil_xdit.comm.host_copies import Transfer, is_on_host, start_through_host
from otil_xdit.errors import ExchangeTimeout

T = TypeVar("T")

Phase = Literal["warmup", "steady"]
"""Whether a message belongs to a warm-up step or to one after it."""


class CounterKey(NamedTuple):
    """What bytes, messages and waits are counted by: the kind of message, and the phase of its step."""

    kind: str
    phase: Phase = "steady"


ByKind = dict[str, dict[Phase, int]]
"""Counts by kind of message and phase of its step: what reports show. Both phases are there, a kind only if counted."""


Neighbours = tuple[torch.Tensor, torch.Tensor]
"""Tensors from the rank before this one and from the rank after it."""

Shares = Mapping[CounterKey, int]
"""The bytes of one message by the counters that they go to; the message itself counts where most of its bytes do."""

# torch 2.13 renamed the collective and warns under the old name; older versions know only that.
_all_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class CollectiveLabel:
    """A collective's counter, and its place in error messages.

    Attributes:
        kind: of message: "kv", "halo", "moments", "output" or another word.
        layer: the layer or layers, or what else is sent, as a phrase: "layer a", "the halo of layer a", "the output".
        step: the denoising step, counted from 0; None outside a generation.
        phase: of the step.
        company: what travels in the same message, as the end of the phrase.
    """

    kind: str
    layer: str
    step: int | None
    phase: Phase = "steady"
    company: str = ""

    @property
    def counter(self) -> CounterKey:
        return CounterKey(self.kind, self.phase)

    def __str__(self) -> str:
        return f"{self.layer}{'' if self.step is None else f' at step {self.step}'}{self.company}"


@dataclass
class Traffic:
    """What one rank handed to collectives and how long it waited for them.

    Attributes:
        sent: bytes of this rank's payloads; an all-gather delivers each of them to world_size - 1 receivers.
        messages: their number.
        waited: seconds of the host.
        device_times: of the device, where one computes.
    """

    sent: Counter[CounterKey] = field(default_factory=Counter)
    messages: Counter[CounterKey] = field(default_factory=Counter)
    waited: defaultdict[CounterKey, float] = field(default_factory=lambda: defaultdict(float))
    device_times: DeviceTimes = field(default_factory=DeviceTimes)

    def count(self, shares: Shares) -> None:
        """Count one message."""
        for counter, nbytes in shares.items():
            self.sent[counter] += nbytes
        self.messages[max(shares, key=lambda counter: shares[counter])] += 1

    def clear(self) -> None:
        for counts in (self.sent, self.messages, self.waited, self.device_times):
            counts.clear()


def by_kind(counts: Mapping[CounterKey, int]) -> ByKind:
    """Return counts by kind and phase; kinds of which nothing was counted are left out."""
    found: ByKind = {key.kind: {"warmup": 0, "steady": 0} for key, count in counts.items() if count}
    for key, count in counts.items():
        if count:
            found[key.kind][key.phase] += count
    return found


class Pending(Generic[T]):
    """Messages under way.

    Args:
        collectives: what sent them.
        works: to be waited for.
        output: what they fill.
        label: the counter of the waiting time, and the place in error messages.
    """

    def __init__(self, collectives: Collectives, works: list[dist.Work], output: T, label: CollectiveLabel) -> None:
        self._collectives, self._works, self._output, self._label = collectives, works, output, label

    def wait(self) -> T:
        """Return the received tensors; on CUDA the current stream waits, on the CPU this thread does.

        Raises:
            ExchangeTimeout: naming the rank, the layer and the step.
        """
        started = time.perf_counter()
        collectives, detector = self._collectives, self._collectives.group.detector
        device_times = collectives.traffic.device_times
        began = device_times.mark() if device_times.is_timing else None
        if detector is not None:
            detector.waiting = True
        try:
            for work in self._works:
                collectives.wait_for(work)
        except RuntimeError as error:
            raise collectives.timed_out(self._label, error) from error
        if detector is not None:
            detector.waiting = False
        if began is not None:
            device_times.add("waited", began)
        collectives.traffic.waited[self._label.counter] += time.perf_counter() - started
        return self._output


class Collectives:
    """Collectives over one group of ranks, with counters and timeouts.

    Every rank of the group must make the same calls in the same order, so no caller may skip one on a condition that
    differs between ranks.

    Args:
        group: the ranks.
        timeout: seconds that one wait may take.
        traffic: counters to share with other collectives; None for their own.

    Attributes:
        host_waits: whether a wait stops the host; otherwise it stops the device's stream.
    """

    def __init__(self, group: PatchGroup, timeout: float, traffic: Traffic | None = None) -> None:
        self.group = group
        self.traffic = Traffic() if traffic is None else traffic
        self._timeout = timeout
        self.host_waits = self._waits_on_host()

    def all_gather(self, payload: torch.Tensor, output: torch.Tensor, label: CollectiveLabel) -> Pending[torch.Tensor]:
        """Start sending `payload` to every rank of the group.

        Args:
            payload: contiguous, same shape and dtype on every rank; must stay unchanged until the wait.
            output: [N, *payload.shape], contiguous; filled by the wait.
            label: the counter, and the place in error messages.
        """
        assert payload.is_contiguous() and output.is_contiguous(), f"{label}: collectives need contiguous tensors"
        self.traffic.count({label.counter: payload.nbytes})
        works = self._start(label, lambda: self._start_gather(payload.view(-1), output.view(-1)))
        return Pending(self, works, output, label)

    def neighbours(
        self,
        to_previous: torch.Tensor,
        to_next: torch.Tensor,
        output: Neighbours,
        shares: tuple[Shares, Shares],
        label: CollectiveLabel,
    ) -> Pending[Neighbours]:
        """Start sending to the ranks before and after this one in the group; the ends have one neighbour.

        Args:
            to_previous, to_next: contiguous; unchanged until the wait. Empty ones are not sent. The receiver must
                expect that: the sizes follow from the layer, alike on every rank.
            output: filled with what the two send by the wait.
            shares: the counters of the two messages' bytes.
            label: the place in error messages.
        """
        rank, ranks = self.group.rank, self.group.world_size
        sends: list[Transfer] = []
        receives: list[Transfer] = []
        sides = ((rank - 1, to_previous, output[0]), (rank + 1, to_next, output[1]))
        for (peer, sent, received), counted in zip(sides, shares, strict=True):
            if not 0 <= peer < ranks:
                continue
            if sent.numel():
                assert sum(counted.values()) == sent.nbytes, f"{label}: every byte that is sent is counted"
                sends.append((dist.isend, sent, peer))
                self.traffic.count(counted)
            if received.numel():
                receives.append((dist.irecv, received, peer))
        works = self._start(label, lambda: self._start_transfers(receives, sends))
        return Pending(self, works, output, label)

    def send(self, payload: torch.Tensor, peer: int, label: CollectiveLabel) -> Pending[torch.Tensor]:
        """Start sending `payload`, contiguous and unchanged until the wait, to one rank of the group, which `receive`s.

        Args:
            payload: of any shape and dtype.
            peer: the receiver's place in the group.
            label: the counter, and the place in error messages.
        """
        self.traffic.count({label.counter: payload.nbytes})
        works = self._start(label, lambda: self._start_transfers([], [(dist.isend, payload, peer)]))
        return Pending(self, works, payload, label)

    def receive(self, output: torch.Tensor, peer: int, label: CollectiveLabel) -> Pending[torch.Tensor]:
        """Start receiving what the rank `peer` of the group `send`s: of the shape and dtype of `output`, contiguous."""
        works = self._start(label, lambda: self._start_transfers([(dist.irecv, output, peer)], []))
        return Pending(self, works, output, label)

    def _start(self, label: CollectiveLabel, start: Callable[[], list[dist.Work]]) -> list[dist.Work]:
        """Tell the failure detector, and start; an error has the label."""
        detector = self.group.detector
        if detector is not None:
            detector.on_collective(str(label))
        try:
            if detector is None or self.host_waits:
                return start()
            reached = torch.cuda.Event()
            reached.record()
            works = start()
            detector.on_enqueued(reached, works)
            return works
        except RuntimeError as error:
            raise self.timed_out(label, error) from error

    # What reaches the process group; the dry run (otil_xdit.dryrun.recorder) has others here.

    def _waits_on_host(self) -> bool:
        # gloo waits on the host and takes a deadline per wait. NCCL's wait only queues a dependency on the stream;
        # given a deadline it would block the host in every layer, so there the failure detector keeps the deadline.
        # A group that was made without a backend's name has gloo for the CPU, and where there is no card nothing else.
        return bool(dist.get_backend(self.group.process_group) == "gloo" or not torch.cuda.is_available())

    def _start_gather(self, payload: torch.Tensor, output: torch.Tensor) -> list[dist.Work]:
        group = self.group
        if not self.host_waits:
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
        group, transfers = self.group.process_group, [*receives, *sends]
        if not transfers:
            return []
        if self.host_waits and not all(is_on_host(tensor) for _, tensor, _ in transfers):
            return start_through_host(transfers, group)
        if self.host_waits:  # what gloo makes of a batch, without checks that take as long as a small message
            return [(group.recv if way is dist.irecv else group.send)([one], to, 0) for way, one, to in transfers]
        return dist.batch_isend_irecv([dist.P2POp(way, one, group=group, group_peer=to) for way, one, to in transfers])

    def wait_for(self, work: dist.Work) -> None:
        """Wait for one of a message's works, with the deadline where the backend takes one."""
        if self.host_waits:
            work.wait(timedelta(seconds=self._timeout))
        else:
            work.wait()

    def timed_out(self, label: CollectiveLabel, error: BaseException) -> ExchangeTimeout:
        """Return what to raise for a collective's own error: it names rank, layer, step and who is to blame."""
        detector = self.group.detector
        reason = reason_of(error)
        if detector is None:
            me, blamed = f"rank {self.group.rank} of {self.group.world_size}", f"({reason})"
        else:
            me, blamed = f"rank {detector.rank} of {dist.get_world_size()}", f"({reason}); {detector.diagnose()}"
        return ExchangeTimeout(
            f"{me}: no answer from the other patches for {label} within {self._timeout:g} s {blamed}"
        )
