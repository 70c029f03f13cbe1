"""The flags of this project: the "Otil options" and the "U-Net options"."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from otil_xdit.catalog.schedulers import SCHEDULERS, scheduler_name
from otil_xdit.method.checks import parse_ratio
from otil_xdit.method.codec import CODECS
from otil_xdit.method.config import (
    QUALITIES,
    Extrapolation,
    Freshness,
    HeldGuidance,
    KvCacheDtype,
    OtilConfig,
    ScoreReference,
    selectors,
)
from otil_xdit.method.window import PUBLISHED_DIT, PUBLISHED_UNET, WindowSettings
from otil_xdit.runtime.strategies import strategies
from otil_xdit.xdit.flags.degrees import UngivenDegree

T = TypeVar("T")


def typed(parse: Callable[[str], T]) -> Callable[[str], T]:
    """`parse` for argparse, which shows the message of this kind of error only."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a whole number") from error


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(f"{text!r} is neither yes nor no")
    return text == "yes"


@dataclass(frozen=True)
class Option:
    """A flag of ours, and the setting in `OtilConfig` that it gives a value to, if it does.

    One without a `metavar` takes no value on the command line and stands for True; `parse` is for other texts.
    """

    flag: str
    metavar: str | None
    help: str
    parse: Callable[[str], Any] = str
    setting: str | None = None


OPTIONS = (
    Option("parallel", "NAME", "How the patches work together: {names}. Default: as xdit does."),
    Option(
        "patch_degree",
        "N",
        "Number of patches; --ring_degree means the same here. Default: the processes that the other degrees leave.",
        _whole_number,
    ),
    Option(
        "otil_quality",
        "HOW",
        f"For people who do not want to know the rest: {', '.join(QUALITIES)} (default balanced).",
        setting="quality",
    ),
    Option(
        "otil_ratio",
        "R",
        f"Share of its sub-blocks that a rank sends each step, 1/8 or 0.125 (default {OtilConfig.ratio:g}).",
        parse_ratio,
        "ratio",
    ),
    Option(
        "otil_codec",
        "HOW",
        "What is sent of a token: its values, or what the others' prediction lacks, in so "
        f"many bits a number: {', '.join(CODECS)} (default {OtilConfig.codec}).",
        setting="codec",
    ),
    Option(
        "otil_freshness",
        "WHEN",
        "After warm-up a step uses exact values of this step, payloads of this step, those "
        f"until the step before, or nothing new: {', '.join(get_args(Freshness))} (default "
        f"{OtilConfig.freshness}).",
        setting="freshness",
    ),
    Option(
        "otil_fresh_share",
        "P",
        "Under displaced: share of the steps, from the first (8 at least, unless it is 0), that wait for their "
        f"payloads (default {OtilConfig.fresh_share:g}).",
        float,
        "fresh_share",
    ),
    Option(
        "otil_extrapolation",
        "HOW",
        "How copies are carried to the next step: not, by a constant share of their velocity, "
        f"or as far as own values moved: {', '.join(get_args(Extrapolation))} (default {OtilConfig.extrapolation}).",
        setting="extrapolation",
    ),
    Option(
        "otil_extrapolation_gain",
        "P",
        f"That constant share (default {OtilConfig.extrapolation_gain:g}).",
        float,
        "extrapolation_gain",
    ),
    Option(
        "otil_velocity_damping",
        "P",
        f"What is left after a step of the velocity of a token that was not sent (default "
        f"{OtilConfig.velocity_damping:g}).",
        float,
        "velocity_damping",
    ),
    Option(
        "otil_block_size",
        "B",
        f"Side of a sub-block, in latent pixels (default {OtilConfig.block_size}).",
        _whole_number,
        "block_size",
    ),
    Option(
        "otil_select",
        "HOW",
        f"What tells the sub-blocks that changed most: {', '.join(selectors())} (default {OtilConfig.select}).",
        setting="select",
    ),
    Option(
        "otil_score_reference",
        "WHAT",
        "What keys and values have changed from: what the others predict, or the step before: "
        f"{', '.join(get_args(ScoreReference))} (default {OtilConfig.score_reference}).",
        setting="score_reference",
    ),
    Option(
        "otil_polling",
        "P",
        f"Share of the sent sub-blocks that is taken in turn instead of by change (default {OtilConfig.polling:g}).",
        float,
        "polling",
    ),
    Option(
        "otil_max_age",
        "N",
        f"No sub-block stays unsent for more than so many steps; 0 for no bound (default {OtilConfig.max_age}).",
        _whole_number,
        "max_age",
    ),
    Option(
        "otil_warmup_steps",
        "N",
        f"Synchronous steps before the first one that sends less (default {OtilConfig.warmup_steps}).",
        _whole_number,
        "warmup_steps",
    ),
    Option(
        "otil_warmup_codec",
        "HOW",
        f"What they send, of all tokens: {', '.join(CODECS)} (default {OtilConfig.warmup_codec}).",
        setting="warmup_codec",
    ),
    Option(
        "otil_refresh",
        "N",
        f"After warm-up make every N-th step synchronous; 0 for never (default {OtilConfig.refresh}).",
        _whole_number,
        "refresh",
    ),
    Option(
        "otil_tolerance",
        "E",
        "A layer whose prediction missed by more than this, relative to its values, waits "
        f"for this step's payloads; 0 for never (default {OtilConfig.tolerance:g}).",
        float,
        "tolerance",
    ),
    Option(
        "otil_halo",
        "WHEN",
        "U-Nets: a convolution takes its neighbours' rows of this step (fresh) or of the "
        f"one before (displaced) (default {OtilConfig.halo}).",
        setting="halo",
    ),
    Option(
        "otil_moments",
        "WHEN",
        f"U-Nets: the same for the moments of a GroupNorm (default {OtilConfig.moments}).",
        setting="moments",
    ),
    Option(
        "otil_window",
        "WHEN",
        "Exchange patches as --otil_freshness says in a window of the steps only, and synchronously outside; under "
        "hybridiff, when to work in two stages. auto: from when the predictions with and without the prompt have come "
        "close; FIRST:END, steps from 0; none (default none, of hybridiff auto).",
        setting="window",
    ),
    Option(
        "otil_window_steps",
        "N",
        f"How many steps a window that is found lasts (default {WindowSettings.steps}).",
        _whole_number,
        "window_steps",
    ),
    Option(
        "otil_window_slope",
        "E",
        "It begins when their difference falls by less than this a step "
        f"(default {PUBLISHED_UNET.slope:g} for U-Nets, {PUBLISHED_DIT.slope:g} for DiTs).",
        float,
        "window_slope",
    ),
    Option(
        "otil_window_span",
        "N",
        f"Over so many steps (default {PUBLISHED_UNET.span} and {PUBLISHED_DIT.span}).",
        _whole_number,
        "window_span",
    ),
    Option(
        "otil_window_cap",
        "N",
        f"Or else at this step (default {PUBLISHED_UNET.cap} and {PUBLISHED_DIT.cap}, earlier where the window would "
        "not end in time).",
        _whole_number,
        "window_cap",
    ),
    Option(
        "otil_window_guidance",
        "HOW",
        "hybridiff: the guidance in the window, where one prediction is computed: that of the step before it, or none: "
        f"{', '.join(get_args(HeldGuidance))} (default {OtilConfig.window_guidance}).",
        setting="window_guidance",
    ),
    Option(
        "otil_kv_cache_dtype",
        "HOW",
        "How a rank keeps its copies: in the layer's own type, in bfloat16, or with velocities "
        f"in 8 bits besides: {', '.join(get_args(KvCacheDtype))} (default {OtilConfig.kv_cache_dtype}).",
        setting="kv_cache_dtype",
    ),
    Option(
        "otil_check",
        None,
        "For debugging, slow: compare a digest of the copies on all ranks at every layer and step, and stop where they "
        "differ.",
        _yes_or_no,
        "check",
    ),
    Option(
        "otil_timeout",
        "SECONDS",
        f"How long a rank waits for the others before it gives up (default {OtilConfig.timeout:g}).",
        float,
        "timeout",
    ),
    Option("otil_report", "FILE", "Write rank 0's sent bytes and waiting time there, as JSON."),
)

SETTINGS = {option.flag: option.setting for option in OPTIONS if option.setting is not None}
"""Flags that are settings of the strategy, and each one's name in `OtilConfig`."""


def add_otil_args(parser: argparse.ArgumentParser) -> None:
    """Add the group "Otil options" to xfuser's parser (or any other); None means that a flag is not given."""
    known = strategies()
    summaries = "; ".join(f"{name} ({strategy.summary})" for name, strategy in known.items())
    group = parser.add_argument_group(
        "Otil options", f"One image on several devices, cut by rows into patches that work together by: {summaries}."
    )
    names = ", ".join(known).replace("%", "%%")
    for option in OPTIONS:
        value: dict[str, Any] = {"metavar": option.metavar, "type": typed(option.parse)}
        if option.metavar is None:  # not "store_true", whose False would look as if it was given
            value = {"action": "store_const", "const": True}
        try:
            group.add_argument(f"--{option.flag}", help=option.help.replace("{names}", names), **value)
        except argparse.ArgumentError:
            if option.flag != "parallel":  # which an xfuser with this project's patches has by itself
                raise
    ring_degree = parser.get_default("ring_degree")
    if ring_degree is not None:
        parser.set_defaults(ring_degree=UngivenDegree(ring_degree))


def add_unet_args(parser: argparse.ArgumentParser) -> None:
    """Add the group "U-Net options" to the parser of xfuser's runner, which alone can follow them."""
    parser.add_argument_group("U-Net options").add_argument(
        "--scheduler",
        metavar="NAME",
        type=typed(scheduler_name),
        help=f"Sample with another scheduler than the model's own: {', '.join(SCHEDULERS)}.",
    )
