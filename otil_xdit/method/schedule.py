"""The mode of each step (synchronous warm-up, displaced steps, refreshes), and the clock that counts steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from otil_xdit.method.config import OtilConfig

Mode = Literal["sync", "fresh", "displaced", "frozen"]
"""How one layer is exchanged at one step: with all ranks' exact values of this step, with the payloads of this step,
with the payloads until the step before, or with what was last known."""

LEAST_FRESH_STEPS = 8
"""Steps that wait for their payloads, warm-up included, however few there are in all: few steps are large ones, and a
prediction from the last of them is poor."""


@dataclass
class Clock:
    """Count the denoising steps of one generation; the scheduler's `step` ticks it.

    Attributes:
        step: number of steps done, which is the index of the present one.
        total: number of steps of the generation; None before the first is done, and where the scheduler does not say.
        draws_noise: whether the scheduler adds noise at every step; False before the first is done.
        after_step: called with the index of a step when it is done and False, and again with True when it turns out to
            have been the last.
    """

    step: int = 0
    total: int | None = None
    draws_noise: bool = False
    after_step: list[Callable[[int, bool], None]] = field(default_factory=list)

    def tick(self) -> None:
        """Count a step that is done."""
        self.step += 1
        for call in self.after_step:
            call(self.step - 1, False)

    def finish(self) -> None:
        """Tell the listeners that no step follows in this generation."""
        for call in self.after_step:
            call(self.step - 1, True)

    def reset(self) -> None:
        """Start a generation."""
        self.step, self.total, self.draws_noise = 0, None, False


@dataclass(frozen=True)
class Schedule:
    """Say how a layer is exchanged at a step; every rank gets the same answer, from settings and counts alone.

    Attributes: see the settings of the same names in `OtilConfig`.
    """

    freshness: Mode
    warmup_steps: int
    refresh: int
    fresh_share: float

    @classmethod
    def from_config(cls, config: OtilConfig) -> Schedule:
        return cls(config.freshness, config.warmup_steps, config.refresh, config.fresh_share)

    def mode(
        self, step: int, num_calls: int, total: int | None, window: bool | None = None, draws_noise: bool = False
    ) -> Mode:
        """Return how a layer is exchanged.

        A layer has its own warm-up besides the generation's: a second transformer that starts halfway (Wan 2.2) has no
        remote values yet, whatever the step is.

        Args:
            step: index of the step, from 0.
            num_calls: how often the layer was called before in this generation.
            total: number of steps; None where it is not known.
            window: whether `step` is in the window; None where the generation has none.
            draws_noise: whether the scheduler adds noise at every step.
        """
        if window is not None:
            return self.freshness if window and num_calls > 0 else "sync"
        done = min(step, num_calls)
        if self.freshness == "sync" or done < self.warmup_steps or self._is_refresh(step):
            return "sync"
        if self.freshness == "displaced" and self.fresh_share > 0:
            # Without a total nobody knows when the image's large shapes have settled, and no velocity predicts what new
            # noise changes: wait throughout.
            if (
                total is None
                or draws_noise
                or done < max(math.ceil(self.fresh_share * total - 1e-9), LEAST_FRESH_STEPS)
            ):
                return "fresh"
        return self.freshness

    def _is_refresh(self, step: int) -> bool:
        """Return whether `step` is a synchronous step after warm-up; frozen runs have none."""
        if self.freshness == "frozen" or self.refresh == 0 or step < self.warmup_steps:
            return False
        return (step - self.warmup_steps + 1) % self.refresh == 0
