"""What each step does: synchronous warm-up, displaced steps, refreshes; and the clock that counts steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from otil_xdit.method.config import OtilConfig

Mode = Literal["sync", "fresh", "displaced", "frozen"]
"""How one layer is exchanged at one step: everybody's exact values of this step, what is sent of them at this step,
what was sent until the step before, or what was last known."""

LEAST_FRESH_STEPS = 8
"""Steps that wait for their payloads, warm-up included, however few there are in all: few steps are large ones, and a
prediction from the last of them is poor."""


@dataclass
class Clock:
    """Counts the denoising steps of one generation; the scheduler's `step` ticks it.

    Attributes:
        step: the number of steps done.
        total: how many there will be, None while that is not known: before the first is done, and where the scheduler
            does not say.
        after_step: called when a step is done, and again when it is known to have been the last: with its number, and
            with that knowledge.
    """

    step: int = 0
    total: int | None = None
    after_step: list[Callable[[int, bool], None]] = field(default_factory=list)

    def tick(self) -> None:
        self.step += 1
        for call in self.after_step:
            call(self.step - 1, False)

    def finish(self) -> None:
        """No step follows in this generation."""
        for call in self.after_step:
            call(self.step - 1, True)

    def reset(self) -> None:
        self.step, self.total = 0, None


@dataclass(frozen=True)
class Schedule:
    """Says how a layer is exchanged at a step; the same answer on every rank, from settings and counts alone."""

    freshness: Mode
    warmup_steps: int
    refresh: int
    fresh_share: float

    @classmethod
    def from_config(cls, config: OtilConfig) -> Schedule:
        return cls(config.freshness, config.warmup_steps, config.refresh, config.fresh_share)

    def mode(self, step: int, num_calls: int, total: int | None, window: bool | None = None) -> Mode:
        """How a layer exchanges at `step` of `total` when it was called `num_calls` times before in this generation.

        A layer has its own warm-up besides the run's: a second transformer that starts halfway (Wan 2.2) has no
        remote values yet, whatever the step is.

        Args:
            window: whether `step` is in the window; None where the run has none.
        """
        if window is not None:
            return self.freshness if window and num_calls > 0 else "sync"
        done = min(step, num_calls)
        if self.freshness == "sync" or done < self.warmup_steps or self.is_refresh(step):
            return "sync"
        if self.freshness == "displaced" and self.fresh_share > 0:
            # Without a total nobody knows when the pictures' large shapes are settled: wait throughout.
            if total is None or done < max(math.ceil(self.fresh_share * total - 1e-9), LEAST_FRESH_STEPS):
                return "fresh"
        return self.freshness

    def is_warmup(self, step: int) -> bool:
        return step < self.warmup_steps

    def is_refresh(self, step: int) -> bool:
        """Whether `step` is a synchronous step after warm-up; frozen runs have none."""
        if self.freshness == "frozen" or self.refresh == 0 or self.is_warmup(step):
            return False
        return (step - self.warmup_steps + 1) % self.refresh == 0
