"""How a layer exchanges at the step under way."""

from __future__ import annotations

from functools import lru_cache

from otil_xdit.comm.collectives import Phase
from otil_xdit.method.config import OtilConfig, SmallFreshness
from otil_xdit.method.schedule import Clock, Mode, Schedule
from otil_xdit.method.window import Window

_MOST_KEPT = 64
"""Modes that are kept: a few hundred layers ask at a step, and nearly all get the same answer."""


class StepModes:
    """The modes of the step under way, which are the same on all ranks.

    Args:
        config: the settings.
        clock: of the steps.
        window: the window of steps.
    """

    def __init__(self, config: OtilConfig, clock: Clock, window: Window) -> None:
        self._clock, self._window, self._warmup_steps = clock, window, config.warmup_steps
        self._mode_of = lru_cache(_MOST_KEPT)(Schedule.from_config(config).mode)

    def of_kv(self, num_calls: int) -> Mode:
        """Return the mode of an attention layer that has been called `num_calls` times in this generation."""
        clock, window = self._clock, self._window
        in_window = window.holds(clock.step) if window.exists else None
        return self._mode_of(clock.step, num_calls, clock.total, in_window, clock.draws_noise)

    def of_small(self, freshness: SmallFreshness, num_calls: int) -> Mode:
        """Return the mode of halo rows or moments whose setting is `freshness`: never ``fresh``, which is ``sync``."""
        mode = self.of_kv(num_calls)
        return "sync" if mode == "fresh" or (mode == "displaced" and freshness == "fresh") else mode

    def phase(self, num_calls: int | None = None) -> Phase:
        """Return the phase of the step, or of a layer's call: a layer that begins late warms up by itself."""
        calls = self._clock.step if num_calls is None else min(self._clock.step, num_calls)
        return "warmup" if calls < self._warmup_steps else "steady"
