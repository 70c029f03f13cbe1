"""Which option to take: the fastest one whose images are as near one process's as is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from otil_xdit.tools.plan.options import CFG, ULYSSES, Option

PSNR: dict[str, dict[str, tuple[float, ...]]] = {
    "U-Net": {
        "otil high": (68.4, 75.4),
        "otil": (58.3, 58.0),
        "compact-2bit": (54.1, 58.9),
        "otil draft": (50.3, 54.5),
        "distrifusion": (46.1, 46.3),
        "otil-paper 1/8": (39.0, 41.4),
        "naive": (29.9, 29.1),
    },
    "DiT": {
        "otil high": (57.4,),
        "otil": (50.0,),
        "compact-2bit": (45.6,),
        "otil draft": (43.1,),
        "distrifusion": (42.6,),
        "otil-paper 1/8": (32.5,),
        "naive": (25.2,),
    },
}
"""Mean PSNR to one process's images, in dB, on 2 ranks with 15 steps: of tiny-sd and tiny-sdxl, and of tiny-dit
(docs/results/fidelity.md). What is not there is exact or has not been measured."""

_EXACT = (math.inf, math.inf)
"""PSNR of one process's images to themselves."""

_TIE = 1.02
"""Predictions that differ by less than this factor are taken for equal."""

_NAMES = {ULYSSES: "Ulysses", CFG: "CFG parallelism"}


@dataclass(frozen=True)
class Advice:
    """The option to take, and why, in a sentence."""

    option: Option
    reason: str


def bar_of(text: str) -> str | float:
    """Parse ``--near``: a strategy whose images are good enough, or decibels.

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
    """Choose the fastest option at or above `bar`; of equals the exact one, then the nearest.

    Args:
        options: with predictions.
        is_unet: which measurements to read.
        bar: see `bar_of`.

    Raises:
        ValueError: where nothing comes up to it.
    """
    kind = "U-Net" if is_unet else "DiT"
    family = {**dict.fromkeys(("sync", ULYSSES, CFG), _EXACT), **PSNR[kind]}
    if isinstance(bar, str) and bar not in family:
        raise ValueError(f"--near {bar}: its images were not measured on a {kind}")
    fit = [option for option in options if _is_near(family.get(option.label, ()), bar, family)]
    if not fit:
        raise ValueError(f"--near {bar}: no strategy on these ranks is measured to be as near; give less")
    least = min(map(_seconds, fit))
    equal = [option for option in fit if _seconds(option) <= least * _TIE]
    best = max(equal, key=lambda option: (min(family[option.label]), -_seconds(option)))
    name, reason = _NAMES.get(best.label, best.label), _reason(best, equal, options, bar, family)
    return Advice(best, f"{name} on {best.degrees}: {reason}")


def _is_near(measured: tuple[float, ...], bar: str | float, family: dict[str, tuple[float, ...]]) -> bool:
    """Tell whether images of a measured PSNR are near enough; what was not measured is not."""
    wanted = family[bar] if isinstance(bar, str) else (bar,) * len(measured)
    return 0 < len(measured) >= len(wanted) and all(
        mine >= other for mine, other in zip(measured, wanted, strict=False)
    )


def _seconds(option: Option) -> float:
    assert option.seconds is not None, "advice is given on predictions"
    return option.seconds


def _reason(
    best: Option, equal: list[Option], options: list[Option], bar: str | float, family: dict[str, tuple[float, ...]]
) -> str:
    if best.is_exact:
        others = ", ".join(option.label for option in equal if not option.is_exact)
        why = f"nothing that approximates ({others}) is faster by more than 2%" if others else "it is fastest"
        return f"exact images, and {why}"
    decibels = " and ".join(f"{value:g}" for value in family[best.label])
    near = f"those of {bar}" if isinstance(bar, str) else f"{bar:g} dB"
    said = f"the fastest whose images are at least as near as {near} ({decibels} dB)"
    exact = [_seconds(option) for option in options if option.is_exact]
    return f"{said}, {min(exact) / _seconds(best):.2f} times as fast as the fastest exact one" if exact else said
