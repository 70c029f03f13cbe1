"""What each step does: synchronous warm-up, displaced steps, refreshes; and the clock that counts steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from otil_xdit.config import OtilConfig

Mode = Literal["sync", "displaced", "frozen"]


@dataclass
class Clock:
    """Counts the denoising steps of one generation; the scheduler's `step` ticks it."""

    step: int = 0

    def tick(self) -> None:
        self.step += 1

    def reset(self) -> None:
        self.step = 0


@dataclass(frozen=True)
class Schedule:
    """Says how a layer is exchanged at a step; the same answer on every rank, from settings and counts alone."""

    freshness: Mode
    warmup_steps: int
    refresh: int

    @classmethod
    def from_config(cls, config: OtilConfig) -> Schedule:
        return cls(config.freshness, config.warmup_steps, config.refresh)

    def mode(self, step: int, visits: int) -> Mode:
        """How a layer exchanges at `step` when it was called `visits` times before in this generation.

        A layer has its own warm-up besides the run's: a second transformer that starts halfway (Wan 2.2) has no
        remote values yet, whatever the step is.
        """
        if self.freshness == "sync" or min(step, visits) < self.warmup_steps or self.is_refresh(step):
            return "sync"
        return self.freshness

    def is_warmup(self, step: int) -> bool:
        return step < self.warmup_steps

    def is_refresh(self, step: int) -> bool:
        """Whether `step` is a synchronous step after warm-up; frozen runs have none."""
        if self.freshness != "displaced" or self.refresh == 0 or self.is_warmup(step):
            return False
        return (step - self.warmup_steps + 1) % self.refresh == 0
