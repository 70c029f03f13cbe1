"""Which option to take: the fastest one whose images are as near one process's as is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from otil_xdit.tools.plan.options import CFG, ULYSSES, Option

PSNR: dict[str, dict[str, tuple[float, ...]]] = {
    "U-Net": {
        "otil high": (62.7, 66.9),
        "otil": (57.1, 57.7),
        "compact-2bit": (53.8, 59.2),
        "otil draft": (48.1, 52.2),
        "distrifusion": (45.9, 47.1),
        "otil-paper 1/8": (38.4, 41.8),
        "naive": (28.8,),
    },
    "DiT": {
        "otil high": (53.5,),
        "otil": (48.8,),
        "compact-2bit": (46.7,),
        "distrifusion": (43.4,),
        "otil draft": (42.0,),
        "otil-paper 1/8": (33.6,),
    },
}
"""Mean PSNR to one process's images, in dB, on 2 ranks with 15 steps: of tiny-sd and tiny-sdxl, and of tiny-dit
(docs/results/fidelity.md). What is not there is exact or has not been measured."""

_TIE = 1.02
"""Predictions that differ by less than this factor are taken for equal."""


@dataclass(frozen=True)
class Advice:
    """The option to take, and why, in a sentence."""

    option: Option
    reason: str


def bar_of(text: str) -> str | float:
    """What ``--near`` names: a strategy whose images are good enough, or decibels.

    Raises:
        ValueError: naming what is accepted.
    """
    if text == "sync" or any(text in family for family in PSNR.values()):
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        names = ", ".join(repr(name) for name in ("sync", *PSNR["U-Net"]))
        raise ValueError(f"--near {text}: give a strategy ({names}) or decibels such as 45")
    return value


def advise(options: list[Option], is_unet: bool, bar: str | float) -> Advice:
    """The fastest option at or above `bar`; of equals the exact one, then the nearest.

    Args:
        options: with predictions.
        is_unet: which measurements to read.
        bar: see `bar_of`.

    Raises:
        ValueError: where nothing comes up to it.
    """
    family = PSNR["U-Net" if is_unet else "DiT"]
    if isinstance(bar, str) and bar != "sync" and bar not in family:
        raise ValueError(f"--near {bar}: its images were not measured on a {'U-Net' if is_unet else 'DiT'}")
    fit = [option for option in options if _is_near(option, family, bar)]
    if not fit:
        raise ValueError(f"--near {bar}: no strategy on these ranks is measured to be as near; give less")
    least = min(_seconds(option) for option in fit)
    equal = [option for option in fit if _seconds(option) <= least * _TIE]
    best = max(equal, key=lambda option: (_nearness(option, family), -_seconds(option)))
    return Advice(best, _reason(best, equal, options, family, bar))


def _is_near(option: Option, family: dict[str, tuple[float, ...]], bar: str | float) -> bool:
    if option.is_exact:
        return True
    if option.label not in family or bar == "sync":
        return False
    measured = family[option.label]
    wanted = family[bar] if isinstance(bar, str) else (bar,) * len(measured)
    return len(measured) >= len(wanted) and all(mine >= other for mine, other in zip(measured, wanted, strict=False))


def _nearness(option: Option, family: dict[str, tuple[float, ...]]) -> float:
    return math.inf if option.is_exact else min(family[option.label])


def _seconds(option: Option) -> float:
    assert option.seconds is not None, "advice is given on predictions"
    return option.seconds


def _reason(
    best: Option, equal: list[Option], options: list[Option], family: dict[str, tuple[float, ...]], bar: str | float
) -> str:
    name = {ULYSSES: "Ulysses", CFG: "CFG parallelism"}.get(best.label, best.label)
    if best.is_exact:
        others = [option.label for option in equal if not option.is_exact]
        why = (
            f"nothing that approximates ({', '.join(others)}) is faster by more than 2%" if others else "it is fastest"
        )
        return f"{name} on {best.composition}: exact images, and {why}"
    dB = " and ".join(f"{value:g}" for value in family[best.label])
    exact = [option for option in options if option.is_exact]
    said = f"{name} on {best.composition}: the fastest whose images are at least as near as {_said(bar)} ({dB} dB)"
    if not exact:
        return said
    gain = min(_seconds(option) for option in exact) / _seconds(best)
    return f"{said}, {gain:.2f} times as fast as the fastest exact one"


def _said(bar: str | float) -> str:
    return f"those of {bar}" if isinstance(bar, str) else f"{bar:g} dB"
