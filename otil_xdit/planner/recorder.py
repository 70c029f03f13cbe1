"""What is sent, without anybody to send it to: an exchange that records, on "meta" tensors.

`RecordedExchange` is the run's own exchange but for the process group, so what it counts is what a run counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from otil_xdit.exchange import Exchange, Neighbours, PatchGroup, Pending, Traffic, Transfer

Pattern = Literal["all-gather", "neighbours", "all-to-all"]

FOREIGN = -1
"""In the place of a request's number, for messages that no communicator knows of and no counter counts."""


@dataclass(eq=False)
class Message:
    """One collective call of one rank.

    Attributes:
        kind: its counter's name: what it carries.
        pattern: how it goes round.
        nbytes: what the rank hands over; to both neighbours together.
        ranks: of the group.
        ask: number of the layer's request that it belongs to; `FOREIGN` where xDiT sends it by itself.
        awaited: whether that same request waited for it, so that nothing was computed meanwhile.
    """

    kind: str
    pattern: Pattern
    nbytes: int
    ranks: int
    ask: int
    awaited: bool = False

    @property
    def wire_bytes(self) -> float:
        """What a rank puts on its link, which is what it takes from it, too: a ring's all-gather passes every other
        rank's payload on, an all-to-all keeps a rank's own share."""
        if self.pattern == "all-gather":
            return self.nbytes * (self.ranks - 1)
        return self.nbytes * (self.ranks - 1) / self.ranks if self.pattern == "all-to-all" else self.nbytes


@dataclass
class Log:
    """Messages in the order in which they were sent; `ask` is the number of the request under way."""

    messages: list[Message] = field(default_factory=list)
    ask: int = 0


class RecordedExchange(Exchange):
    """An exchange whose messages arrive at once and hold nothing.

    Args:
        group: its process group may be None.
        timeout, traffic: as for `Exchange`.
        log: where the messages go.
    """

    def __init__(self, group: PatchGroup, timeout: float, traffic: Traffic | None = None, *, log: Log) -> None:
        super().__init__(group, timeout, traffic)
        self._log = log
        self._kind = ""

    def all_gather(self, payload: torch.Tensor, output: torch.Tensor, kind: str, where: str) -> Pending[torch.Tensor]:
        self._kind = kind
        return super().all_gather(payload, output, kind, where)

    def neighbours(self, *args: Any, **kwargs: Any) -> Pending[Neighbours]:
        self._kind = "halo"  # whatever travels with the rows; the counters know it better
        return super().neighbours(*args, **kwargs)

    def _waits_on_host(self) -> bool:
        return True

    def _start_gather(self, payload: torch.Tensor, output: torch.Tensor) -> list[dist.Work]:
        return [self._note("all-gather", payload.nbytes)]

    def _start_transfers(self, receives: list[Transfer], sends: list[Transfer]) -> list[dist.Work]:
        if not receives and not sends:
            return []
        return [self._note("neighbours", sum(tensor.nbytes for _, tensor, _ in sends))]

    def _note(self, pattern: Pattern, nbytes: int) -> Any:
        message = Message(self._kind, pattern, nbytes, self.group.world_size, self._log.ask)
        self._log.messages.append(message)
        return _Arrived(self._log, message)


@dataclass(frozen=True)
class _Arrived:
    """What stands for a `dist.Work`."""

    log: Log
    message: Message

    def wait(self, deadline: timedelta | None = None) -> None:
        self.message.awaited = self.log.ask == self.message.ask
