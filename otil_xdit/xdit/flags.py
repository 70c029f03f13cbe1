"""The command line's "Otil options" and "U-Net options": what they mean together with xDiT's own flags.

`add_otil_args` and `add_unet_args` tell a parser about them; `choose` turns parsed values into a `ParallelChoice`,
before any process group exists and before weights load.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from otil_xdit.config import (
    QUALITIES,
    Against,
    CodecName,
    Copies,
    Freshness,
    OtilConfig,
    Predict,
    Selector,
    parse_ratio,
)
from otil_xdit.registry import Strategy, get_strategy, strategies
from otil_xdit.xdit.degrees import FlagError, UngivenDegree, degree, resolve_patch_degree
from otil_xdit.xdit.geometry import check_geometry
from otil_xdit.xdit.schedulers import SCHEDULERS, scheduler_name
from otil_xdit.xdit.unet_facts import UnetFacts, facts_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

_REFUSED = {
    "pipefusion_parallel_degree": "PipeFusion cuts the image into patches itself",
    "tensor_parallel_degree": "untested",
    "cache_method": "a cached step would skip the exchange",
    "use_teacache": "a cached step would skip the exchange",
    "use_fbcache": "a cached step would skip the exchange",
    "use_fp8_comms": "it rewrites what the ring slot sends",
    "use_fast_attn": "it skips attention layers, and their exchange with them",
    "use_torch_compile": "untested",
    "use_ray": "untested",
    "vae_parallel_size": "it takes ranks away from the patches",
}
"""xDiT's flags that no strategy works with, and why. A degree counts as set from 2 on, others when they are true."""

_REFUSED_BY_UNETS = {
    **_REFUSED,
    **dict.fromkeys(
        ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_cpu_offload"),
        "it replaces the forward methods that patches replace",
    ),
}
"""The same for U-Nets that share an image among ranks, whether a strategy is named or not."""

_SHARING = (
    "ulysses_degree",
    "ring_degree",
    "use_cfg_parallel",
    "pipefusion_parallel_degree",
    "tensor_parallel_degree",
)
"""Flags that put one image on several ranks."""


@dataclass(frozen=True)
class ParallelChoice:
    """What the command line asks for.

    Attributes:
        strategy: the strategy that ``--parallel`` names.
        config: its settings, as its `make_config` built them.
        patch_degree: number of patches; the size of xDiT's ring dimension.
        ulysses_degree: ranks that share a patch's attention heads.
        report: file for rank 0's report of bytes and waiting time, or None.
    """

    strategy: Strategy
    config: Any
    patch_degree: int
    ulysses_degree: int
    report: str | None = None


def _typed(parse: Callable[[str], T]) -> Callable[[str], T]:
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
class _Option:
    """A flag of ours, and the setting in `OtilConfig` that it gives a value to, if it does.

    One without a `metavar` takes no value on the command line and stands for True; `parse` is for other texts.
    """

    flag: str
    metavar: str | None
    help: str
    parse: Callable[[str], Any] = str
    setting: str | None = None


OPTIONS = (
    _Option("parallel", "NAME", "How the patches work together: {names}. Default: as xdit does."),
    _Option(
        "patch_degree",
        "N",
        "Number of patches; --ring_degree means the same here. Default: the processes that the other degrees leave.",
        _whole_number,
    ),
    _Option(
        "otil_quality",
        "HOW",
        f"For people who do not want to know the rest: {', '.join(QUALITIES)} (default balanced).",
        setting="quality",
    ),
    _Option(
        "otil_ratio",
        "R",
        f"Share of its sub-blocks that a rank sends each step, 1/8 or 0.125 (default {OtilConfig.ratio:g}).",
        parse_ratio,
        "ratio",
    ),
    _Option(
        "otil_codec",
        "HOW",
        "What is sent of a token: its values, or what the others' prediction lacks, in so "
        f"many bits a number: {', '.join(get_args(CodecName))} (default {OtilConfig.codec}).",
        setting="codec",
    ),
    _Option(
        "otil_freshness",
        "WHEN",
        "After warm-up a step uses exact values of this step, payloads of this step, those "
        f"until the step before, or nothing new: {', '.join(get_args(Freshness))} (default "
        f"{OtilConfig.freshness}).",
        setting="freshness",
    ),
    _Option(
        "otil_fresh_share",
        "P",
        "Under displaced: share of the steps, from the first (8 at least, unless it is 0), that wait for their "
        f"payloads (default {OtilConfig.fresh_share:g}).",
        float,
        "fresh_share",
    ),
    _Option(
        "otil_predict",
        "HOW",
        "How copies are carried to the next step: not, by a constant share of their velocity, "
        f"or as far as own values moved: {', '.join(get_args(Predict))} (default {OtilConfig.predict}).",
        setting="predict",
    ),
    _Option(
        "otil_gain",
        "P",
        f"That constant share (default {OtilConfig.gain:g}).",
        float,
        "gain",
    ),
    _Option(
        "otil_damping",
        "P",
        f"What is left after a step of the velocity of a token that was not sent (default {OtilConfig.damping:g}).",
        float,
        "damping",
    ),
    _Option(
        "otil_block",
        "B",
        f"Side of a sub-block, in latent pixels (default {OtilConfig.block}).",
        _whole_number,
        "block",
    ),
    _Option(
        "otil_select",
        "HOW",
        f"What tells the sub-blocks that changed most: {', '.join(get_args(Selector))} (default {OtilConfig.select}).",
        setting="select",
    ),
    _Option(
        "otil_against",
        "WHAT",
        "What keys and values have changed from: what the others predict, or the step before: "
        f"{', '.join(get_args(Against))} (default {OtilConfig.against}).",
        setting="against",
    ),
    _Option(
        "otil_polling",
        "P",
        f"Share of the sent sub-blocks that is taken in turn instead of by change (default {OtilConfig.polling:g}).",
        float,
        "polling",
    ),
    _Option(
        "otil_max_age",
        "N",
        f"No sub-block stays unsent for more than so many steps; 0 for no bound (default {OtilConfig.max_age}).",
        _whole_number,
        "max_age",
    ),
    _Option(
        "otil_warmup",
        "N",
        f"Synchronous steps before the first one that sends less (default {OtilConfig.warmup_steps}).",
        _whole_number,
        "warmup_steps",
    ),
    _Option(
        "otil_warmup_codec",
        "HOW",
        f"What they send, of all tokens: {', '.join(get_args(CodecName))} (default {OtilConfig.warmup_codec}).",
        setting="warmup_codec",
    ),
    _Option(
        "otil_refresh",
        "N",
        f"After warm-up make every N-th step synchronous; 0 for never (default {OtilConfig.refresh}).",
        _whole_number,
        "refresh",
    ),
    _Option(
        "otil_tolerance",
        "E",
        "A layer whose prediction missed by more than this, relative to its values, waits "
        f"for this step's payloads; 0 for never (default {OtilConfig.tolerance:g}).",
        float,
        "tolerance",
    ),
    _Option(
        "otil_halo",
        "WHEN",
        "U-Nets: a convolution takes its neighbours' rows of this step (fresh) or of the "
        f"one before (displaced) (default {OtilConfig.halo}).",
        setting="halo",
    ),
    _Option(
        "otil_moments",
        "WHEN",
        f"U-Nets: the same for the moments of a GroupNorm (default {OtilConfig.moments}).",
        setting="moments",
    ),
    _Option(
        "otil_copies",
        "HOW",
        "How a rank keeps its copies: in the layer's own type, in bfloat16, or with velocities "
        f"in 8 bits besides: {', '.join(get_args(Copies))} (default {OtilConfig.copies}).",
        setting="copies",
    ),
    _Option(
        "otil_check",
        None,
        "For debugging, slow: compare a digest of the copies on all ranks at every layer and step, and stop where they "
        "differ.",
        _yes_or_no,
        "check",
    ),
    _Option(
        "otil_timeout",
        "SECONDS",
        f"How long a rank waits for the others before it gives up (default {OtilConfig.timeout:g}).",
        float,
        "timeout",
    ),
    _Option("otil_report", "FILE", "Write rank 0's sent bytes and waiting time there, as JSON."),
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
        value: dict[str, Any] = {"metavar": option.metavar, "type": _typed(option.parse)}
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
        type=_typed(scheduler_name),
        help=f"Sample with another scheduler than the model's own: {', '.join(SCHEDULERS)}.",
    )


def choose(values: Mapping[str, Any], world_size: int | None) -> ParallelChoice | None:
    """What the flags ask for, or None without ``--parallel``.

    Args:
        values: parsed flags by name, as ``vars(parser.parse_args())`` gives them; missing ones count as not given.
        world_size: number of processes, or None where it shall follow from the degrees.

    Raises:
        FlagError: for flags that contradict each other, the world or the image's size.
    """
    name, unet = values.get("parallel"), facts_of(values.get("model"))
    _check_scheduler(values, unet)
    if name is None:
        _refuse_without_parallel(values)
        if unet is not None:
            _check_shared_unet(values)
        return None
    strategy = _flag_errors(lambda: get_strategy(name))
    _refuse_unsupported(values, f"--parallel {name}", _REFUSED if unet is None else _REFUSED_BY_UNETS)
    patch_degree = resolve_patch_degree(values, world_size)
    given = {setting: values[flag] for flag, setting in SETTINGS.items() if values.get(flag) is not None}
    config = _flag_errors(lambda: strategy.make_config(given))
    ulysses_degree = degree(values, "ulysses_degree")
    _check_selector(config, ulysses_degree)
    _flag_errors(lambda: check_geometry(values, patch_degree, ulysses_degree, given.get("block")))
    _check_report(values.get("otil_report"))
    for setting in {"halo", "moments"} & set(given) if unet is None else ():
        logger.warning("--otil_%s has an effect on U-Nets only", setting)
    if patch_degree == 1 and (unet is None or ulysses_degree == 1):
        logger.warning("--parallel %s has no effect with one patch", name)
    return ParallelChoice(strategy, config, patch_degree, ulysses_degree, values.get("otil_report"))


def _refuse_without_parallel(values: Mapping[str, Any]) -> None:
    given = [f"--{option.flag}" for option in OPTIONS if values.get(option.flag) is not None]
    if given:
        raise FlagError(f"{', '.join(given)} given without --parallel; add --parallel {'|'.join(strategies())}")


def _refuse_unsupported(values: Mapping[str, Any], what: str, refused: Mapping[str, str]) -> None:
    """Raises `FlagError` where one of xDiT's flags in `refused` is given together with `what`."""
    for flag, reason in refused.items():
        value = values.get(flag)
        if not value or (flag.endswith("_degree") and value == 1):
            continue
        shown = f"--{flag}" if value is True else f"--{flag} {value}"
        raise FlagError(f"{what} and {shown} are not supported together ({reason})")


def _check_shared_unet(values: Mapping[str, Any]) -> None:
    """Without ``--parallel`` a U-Net that shares an image among ranks runs as ``--parallel sync`` would."""
    if any(degree(values, flag) > 1 for flag in _SHARING):
        _refuse_unsupported(values, f"--model {values['model']} on several ranks", _REFUSED_BY_UNETS)
    patches, ulysses_degree = degree(values, "ring_degree"), degree(values, "ulysses_degree")
    _flag_errors(lambda: check_geometry(values, patches, ulysses_degree, None))


def _check_scheduler(values: Mapping[str, Any], unet: UnetFacts | None) -> None:
    if values.get("scheduler") is not None and unet is None:
        raise FlagError(
            f"--scheduler {values['scheduler']} is for U-Nets; --model {values.get('model')} is none, and keeps the "
            "scheduler that xDiT gives it"
        )


def _check_selector(config: Any, ulysses_degree: int) -> None:
    select = getattr(config, "select", "")
    if ulysses_degree > 1 and str(select).startswith("latent"):
        raise FlagError(
            f"--otil_select {select} is not supported together with --ulysses_degree {ulysses_degree}: a rank has the "
            "latent of its own rows only; choose kv-cosine or kv-l2"
        )


def _check_report(report: str | None) -> None:
    if report is not None and not Path(report).absolute().parent.is_dir():
        raise FlagError(f"--otil_report {report}: no such directory")


def _flag_errors(call: Callable[[], T]) -> T:
    """The call's result; its `ValueError` as a `FlagError` that names the flag instead of the setting."""
    try:
        return call()
    except ValueError as error:
        message = str(error)
        for flag, setting in SETTINGS.items():
            if message.startswith(f"{setting} is "):
                message = f"--{flag}{message[len(setting) :]}"
        raise FlagError(message) from error
