"""What passes between a bench and its ranks, through a Unix socket; frozen data without imports of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Answer = dict[str, Any]
"""What a rank says; ``{"error": text}`` when something went wrong, and then it ends."""


@dataclass(frozen=True)
class ImageTask:
    """What a rank is to make images with.

    Attributes:
        strategy: its text, as `otil_xdit.tools.bench.plan.parse_strategy` takes it.
        folder: of the model, in diffusers format.
        width, size, sampler, steps, guidance: as in `otil_xdit.tools.bench.plan.Plan`.
    """

    strategy: str
    folder: str
    width: int
    size: int
    sampler: str
    steps: int
    guidance: float


@dataclass(frozen=True)
class GatherTask:
    """A rank that times all-gathers.

    Attributes:
        sizes: of one rank's payload, in bytes.
        repeats: all-gathers of each size.
    """

    sizes: tuple[int, ...]
    repeats: int
