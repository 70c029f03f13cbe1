"""`OtilConfig`: every setting of the patch exchange, validated before any process group exists."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, get_args

Freshness = Literal["sync", "displaced", "frozen"]
"""What a rank knows of the others after warm-up: this step's values, an earlier step's, or the last warm-up step's."""

Selector = Literal["latent-cosine", "latent-l2", "kv-cosine", "kv-l2", "random"]
"""What is compared between consecutive steps to find the sub-blocks that changed most."""

SmallFreshness = Literal["fresh", "displaced"]
"""Whether a U-Net's halo rows and moments are those of this step or, like keys and values, of the one before."""

MAX_BLOCK = 64


@dataclass(frozen=True)
class OtilConfig:
    """Settings of the exchange between the patches of one image.

    Attributes:
        freshness: ``sync`` gathers every step's keys and values before they are used (exact); ``displaced`` uses
            those of the previous step while the new ones travel (DistriFusion, CVPR 2024); ``frozen`` exchanges
            nothing after warm-up.
        ratio: share k/K of a patch's sub-blocks that a rank sends each displaced step, in (0, 1]. ``1`` sends all.
        block: side b of a b x b sub-block, in latent pixels.
        select: which change picks the sub-blocks (Otil, CVPR 2026, compares the latent by cosine similarity).
        polling: share of the k sub-blocks that is taken in turn instead of by change, in [0, 1]. With p polled
            sub-blocks a step, none stays unsent for more than ceil(K / p) displaced steps.
        warmup_steps: number of initial synchronous steps, at least 1.
        refresh: after warm-up every `refresh`-th step is synchronous too; 0 for never.
        halo: ``fresh`` lets a convolution wait for its neighbours' rows of this step; ``displaced`` takes those of the
            step before (DistriFusion). Read where `freshness` is ``displaced``; U-Nets only.
        moments: the same for the moments of a GroupNorm.
        timeout: seconds that a rank waits for the others in one collective.
        seed: seeds the ``random`` selector.

    Raises:
        ValueError: naming the setting, its value and what would be accepted.
    """

    freshness: Freshness = "displaced"
    ratio: float = 0.125
    block: int = 4
    select: Selector = "kv-cosine"
    polling: float = 0.5
    warmup_steps: int = 2
    refresh: int = 0
    halo: SmallFreshness = "fresh"
    moments: SmallFreshness = "fresh"
    timeout: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("freshness", self.freshness, get_args(Freshness))
        _check_choice("select", self.select, get_args(Selector))
        _check_choice("halo", self.halo, get_args(SmallFreshness))
        _check_choice("moments", self.moments, get_args(SmallFreshness))
        _check_number("ratio", self.ratio, above=0.0, up_to=1.0)
        _check_number("polling", self.polling, above=None, up_to=1.0)
        _check_integer("block", self.block, low=1, high=MAX_BLOCK)
        _check_integer("warmup_steps", self.warmup_steps, low=1)
        _check_integer("refresh", self.refresh, low=0)
        _check_integer("seed", self.seed, low=0)
        _check_number("timeout", self.timeout, above=0.0, up_to=math.inf)

    def replace(self, **changes: Any) -> OtilConfig:
        """A copy with `changes`, validated again."""
        return replace(self, **changes)


def parse_ratio(text: str) -> float:
    """``"1/8"`` or ``"0.125"`` as a float; raises `ValueError` for anything else or outside (0, 1]."""
    try:
        value = float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not a ratio; give a fraction such as 1/8 or a number such as 0.125") from None
    _check_number("ratio", value, above=0.0, up_to=1.0)
    return value


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose from {', '.join(choices)}")


def _check_number(name: str, value: Any, above: float | None, up_to: float) -> None:
    low_end = "[0" if above is None else f"({above:g}"
    accepted = f"a number in {low_end}, {up_to:g}{')' if math.isinf(up_to) else ']'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(f"{name} is {value!r}; give {accepted}")
    too_low = value < 0 if above is None else value <= above
    if too_low or value > up_to or math.isinf(value):
        raise ValueError(f"{name} is {value:g}; give {accepted}")


def _check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    accepted = f"a whole number from {low}" + (f" to {high}" if high is not None else " up")
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{name} is {value!r}; give {accepted}")
