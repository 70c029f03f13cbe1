"""`PeerStatus`: where a rank is in a generation, as it tells the others; and who of them is to blame for a failure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

StatusKind = Literal["waits", "computes", "failed", "done"]
"""What a rank does: waits for others, computes, has left with an exception, has finished the generation."""


@dataclass(frozen=True)
class PeerStatus:
    """Where a rank is in a generation.

    Attributes:
        kind: what it does there.
        where: the last message that it began, "layer ... at step ...".
        times: how often it has begun that message in this generation.
        error: what it failed with; empty unless it failed by itself.
        order: the `NotFinite.order` of that error, where it is one.
    """

    kind: StatusKind
    where: str
    times: int
    error: str = ""
    order: tuple[int, int] | None = None

    @classmethod
    def from_json(cls, text: bytes) -> PeerStatus:
        """Return the status that `to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "order": values["order"] and tuple(values["order"])})

    def to_json(self) -> str:
        """Return the status as text for the store."""
        return json.dumps(asdict(self))

    def is_at(self, other: PeerStatus) -> bool:
        """Tell whether two ranks are at the same place.

        It is the last message that says so, and not the number of all: the ranks of a network in two stages begin other
        messages until the step's output.
        """
        return (self.where, self.times) == (other.where, other.times)

    def __str__(self) -> str:
        if self.kind == "done":
            return "is done"
        if self.kind == "failed":
            return f"failed: {self.error} (after {self.where})"
        return f"{'waits for' if self.kind == 'waits' else 'computes after'} {self.where}"


def describe_error(error: BaseException) -> str:
    """Return an exception's class and the first line of its message."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def describe_culprits(statuses: Mapping[int, PeerStatus], silent: Mapping[int, str]) -> str:
    """Return who is to blame: the ranks that failed and those that say nothing; all ranks where there is neither.

    Args:
        statuses: of the ranks that answered, by rank.
        silent: where each of the other ranks was last seen, by rank.
    """
    culprits = [f"rank {rank} {status}" for rank, status in statuses.items() if status.kind == "failed"]
    culprits += [
        f"rank {rank} says nothing, so it has died, hangs or is stopped (last seen at {where})"
        for rank, where in silent.items()
    ]
    return "; ".join(culprits or [f"rank {rank} {status}" for rank, status in statuses.items()])
