"""Collectives that record their messages instead of sending them, on "meta" tensors.

`RecordedCollectives` are the run's own `Collectives` but for the process group, so what they count is what a run
counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from otil_xdit.comm.collectives import CollectiveLabel, Collectives, Neighbours, Pending, Traffic
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.comm.host_copies import Transfer

if TYPE_CHECKING:
    import torch.distributed as dist

Pattern = Literal["all-gather", "neighbours", "all-to-all"]

FOREIGN = -1
"""In the place of a request's number, for messages that no communicator knows of and no counter counts."""


@dataclass(eq=False)
class Message:
    """One collective call of one rank.

    Attributes:
        kind: of message.
        pattern: which ranks get it.
        nbytes: bytes that the rank hands over; to both neighbours together.
        ranks: number of ranks of the group.
        request: number of the layer's request that it belongs to; `FOREIGN` where xDiT sends it by itself.
        awaited: whether that same request waited for it, so that nothing was computed meanwhile.
    """

    kind: str
    pattern: Pattern
    nbytes: int
    ranks: int
    request: int
    awaited: bool = False

    @property
    def wire_bytes(self) -> float:
        """Bytes that a rank puts on its link, and takes from it: a ring's all-gather passes every other rank's payload
        on, an all-to-all keeps a rank's own share."""
        if self.pattern == "all-gather":
            return self.nbytes * (self.ranks - 1)
        return self.nbytes * (self.ranks - 1) / self.ranks if self.pattern == "all-to-all" else self.nbytes


@dataclass
class Log:
    """Messages in the order in which they were sent; `request` is the number of the request under way."""

    messages: list[Message] = field(default_factory=list)
    request: int = 0


class RecordedCollectives(Collectives):
    """Collectives whose messages arrive at once and hold nothing.

    Args:
        group: its process group may be None.
        timeout, traffic: as for `Collectives`.
        log: where the messages go.
    """

    def __init__(self, group: PatchGroup, timeout: float, traffic: Traffic | None = None, *, log: Log) -> None:
        super().__init__(group, timeout, traffic)
        self._log = log
        self._kind = ""

    def all_gather(self, payload: torch.Tensor, output: torch.Tensor, label: CollectiveLabel) -> Pending[torch.Tensor]:
        self._kind = label.kind
        return super().all_gather(payload, output, label)

    def neighbours(self, *args: Any, **kwargs: Any) -> Pending[Neighbours]:
        self._kind = "halo"  # whatever travels with the rows; the counters know it better
        return super().neighbours(*args, **kwargs)

    def send(self, payload: torch.Tensor, peer: int, label: CollectiveLabel) -> Pending[torch.Tensor]:
        self._kind = label.kind
        return super().send(payload, peer, label)

    def _waits_on_host(self) -> bool:
        return True

    def _start_gather(self, payload: torch.Tensor, output: torch.Tensor) -> list[dist.Work]:
        return [self._record("all-gather", payload.nbytes)]

    def _start_transfers(self, receives: list[Transfer], sends: list[Transfer]) -> list[dist.Work]:
        if not receives and not sends:
            return []
        return [self._record("neighbours", sum(tensor.nbytes for _, tensor, _ in sends))]

    def _record(self, pattern: Pattern, nbytes: int) -> Any:
        message = Message(self._kind, pattern, nbytes, self.group.world_size, self._log.request)
        self._log.messages.append(message)
        return _Arrived(self._log, message)


class ShapesOnly(TorchFunctionMode):
    """Skips what only fills tensors of known shapes: functions with ``out``, methods that work in place,
    and arithmetic between tensors of one shape and type. On "meta" there is nothing to fill, and torch's way to tell
    the shapes again takes most of a plan's time."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        out = given.get("out")
        if isinstance(out, torch.Tensor):
            return out
        name = getattr(func, "__name__", "")
        if name in _IN_PLACE and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return args[0]
        if name in _ARITHMETIC and not given and _are_alike(args):
            return torch.empty_like(args[0])
        return func(*args, **given)


def _are_alike(operands: tuple[Any, ...]) -> bool:
    """Tell whether all are floating-point tensors on "meta", all of one shape and type."""
    return all(isinstance(one, torch.Tensor) and one.is_meta and one.is_floating_point() for one in operands) and (
        len({(one.shape, one.dtype) for one in operands}) == 1
    )


_ARITHMETIC = frozenset(("add", "sub", "mul", "square"))


_IN_PLACE = frozenset(
    "abs_ add_ addcdiv_ addcmul_ bitwise_and_ bitwise_left_shift_ bitwise_or_ bitwise_right_shift_ ceil_ clamp_ "
    "clamp_max_ clamp_min_ copy_ div_ exp2_ fill_ floor_ lerp_ log2_ masked_fill_ mul_ neg_ nan_to_num_ pow_ "
    "reciprocal_ round_ rsqrt_ sign_ sqrt_ square_ sub_ where_ zero_".split()
)
"""Methods that keep the shape of what they work on."""


@dataclass(frozen=True)
class _Arrived:
    """Stands for a `dist.Work`."""

    log: Log
    message: Message

    def wait(self, deadline: timedelta | None = None) -> None:
        self.message.awaited = self.log.request == self.message.request
