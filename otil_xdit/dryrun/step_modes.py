"""Which mode each step of a run is of: how it is exchanged, or that it is computed in two stages."""

from __future__ import annotations

from collections.abc import Sequence

from otil_xdit.method.config import OtilConfig
from otil_xdit.method.schedule import Schedule
from otil_xdit.method.window import AUTO, NONE

WARMUP = "warm-up"

_ENDLESS = 10**6
"""More steps than any run has."""

STAGED, LAST_STAGED = "staged", "staged, last"
"""Steps in two stages; after the last one of the window nobody wants to know what the first stage gave."""


def modes_of(
    config: OtilConfig, steps: int, is_unet: bool = True, found: Sequence[int] | None = None
) -> tuple[str, ...]:
    """Return the mode of every step: `WARMUP`, `STAGED`, `LAST_STAGED`, or that of `Schedule.mode`.

    Args:
        config: the settings.
        steps: their number.
        is_unet: whether the network is a U-Net, where the settings leave the window open.
        found: where that window was found, as a report has it; None for the step at which it begins at the latest.

    Raises:
        ValueError: for settings under which that is decided by what the network computes, or a window that so many
            steps have no room for.
    """
    if config.tolerance:
        raise ValueError(f"tolerance is {config.tolerance:g}: which layers wait then depends on the image; give 0")
    schedule, window = Schedule.from_config(config), window_of(config, steps, is_unet, found)
    has_window = config.window != NONE

    def mode(step: int) -> str:
        if step in window and config.requires_cfg_parallel:
            return STAGED if step + 1 in window else LAST_STAGED
        if step < config.warmup_steps and step not in window:
            return WARMUP
        return schedule.mode(step, step, steps if step else None, step in window if has_window else None)

    return tuple(map(mode, range(steps)))


def window_of(config: OtilConfig, steps: int, is_unet: bool, found: Sequence[int] | None) -> range:
    """Return the steps of the window; an empty range where there is none."""
    settings = config.window_settings
    if settings.kind == NONE:
        return range(0)
    settings.check(steps)
    if settings.kind == AUTO and found is None:
        cap = settings.thresholds(is_unet, steps).cap
        return range(cap, cap + settings.steps)
    return range(*(settings.given or found or (0, 0)))


def is_staged(mode: str) -> bool:
    """Tell whether a step of this mode is computed in two stages."""
    return mode in (STAGED, LAST_STAGED)


def steady_config(config: OtilConfig, mode: str) -> OtilConfig:
    """Return settings whose steps are of `mode`, as they are under `config`, after one or two of warm-up.

    The second warm-up step is the first that needs memory for a velocity. No window is looked for, as nothing is
    predicted.
    """
    warmup = min(config.warmup_steps, 2)
    config = config.replace(window=NONE, requires_cfg_parallel=False)
    if mode == "displaced":
        # In a window no step waits, whatever the share of those that do, by which passes of guidance agree on gains.
        return config.replace(warmup_steps=warmup, refresh=0, window=f"{warmup}:{_ENDLESS}")
    if mode == WARMUP or config.freshness == "sync":
        return config.replace(warmup_steps=warmup)
    if mode == "sync":
        return config.replace(warmup_steps=warmup, refresh=1)
    return config.replace(warmup_steps=warmup, refresh=0, freshness=mode, fresh_share=0.0)
