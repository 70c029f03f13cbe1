"""The flags of this project: the "Otil options" and the "U-Net options"."""

from __future__ import annotations

import argparse
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from otil_xdit.catalog.schedulers import SCHEDULERS, scheduler_name
from otil_xdit.method.checks import check_choice, parse_whole_number
from otil_xdit.method.config import QUALITIES, SETTINGS
from otil_xdit.runtime.strategies import strategies
from otil_xdit.xdit.flags.degrees import UngivenDegree
from otil_xdit.xdit.flags.parsing import take_values_with_minus, typed

VAE_CHOICES = ("patches", "whole")

VAE_HELP = "How images are encoded and decoded: the ranks share the rows of an AutoencoderKL, or each computes all."


def parse_vae(text: str) -> str:
    """Read where the VAE is computed.

    Raises:
        ValueError: for anything but `VAE_CHOICES`.
    """
    check_choice("WHERE", text, VAE_CHOICES)  # as --help calls it; argparse names the flag
    return text


AUTO = "auto"
"""Shares that a measured step decides."""

LARGEST_SHARE = 1_000_000
"""More than a network has rows or tokens to share out."""


def parse_shares(text: str) -> tuple[int, ...]:
    """Read the shares of patches.

    Raises:
        ValueError: for anything but whole numbers from 1 to `LARGEST_SHARE`.
    """
    parts = [part.strip() for part in text.split(",")]
    # int refuses numbers of thousands of digits, in words of its own.
    if not all(part.isdecimal() and len(part) < 20 and 0 < int(part) <= LARGEST_SHARE for part in parts):
        raise ValueError(
            f"{reprlib.repr(text)}; give a whole number from 1 to {LARGEST_SHARE} for each patch, such as 3,2, "
            f"or {AUTO}"
        )
    return tuple(map(int, parts))


Shares = tuple[int, ...] | Literal["auto"]
"""Of the patches, in any unit; empty for equal ones."""


def parse_shares_or_auto(text: str) -> Shares:
    """Read the shares of patches, which may be ``auto``; see `parse_shares`."""
    return "auto" if text == AUTO else parse_shares(text)


def check_given_shares(given: Any) -> Shares:
    """Return the shares of patches that Python code gives: numbers, or text as on the command line.

    Raises:
        ValueError: for anything else.
    """
    text = given if isinstance(given, str) else ",".join(map(str, given)) if isinstance(given, Iterable) else str(given)
    try:
        return parse_shares_or_auto(text) if text else ()
    except ValueError as error:
        raise ValueError(f"patch_shares is {error}") from None


def check_shares(shares: Shares, patches: int, model: str = "", why_equal: str = "") -> None:
    """Refuse shares that do not go with a model or with the number of patches.

    Args:
        shares: that are asked for.
        patches: their number.
        model: its name.
        why_equal: why its patches are equal; empty where they need not be.

    Raises:
        ValueError: naming flag and value.
    """
    given = shares if isinstance(shares, str) else ",".join(map(str, shares))
    if shares and why_equal:
        raise ValueError(f"--patch_shares {given} is not possible with {model}: {why_equal}; leave it out")
    if shares and shares != AUTO and len(shares) != patches:
        raise ValueError(
            f"--patch_shares {given}: {len(shares)} given, and there are {patches} patches; give one for each"
        )


@dataclass(frozen=True)
class Option:
    """A flag of ours.

    Attributes:
        flag: its name, without dashes.
        metavar: what ``--help`` shows for the value; None for a switch, which takes none and stands for True.
        help: one line.
        parse: reads the value; raises `ValueError`.
        setting: the setting of the strategy that it gives a value to, if it does.
    """

    flag: str
    metavar: str | None
    help: str
    parse: Callable[[str], Any] = str
    setting: str | None = None


def options() -> tuple[Option, ...]:
    """Return all "Otil options", with the strategies, codecs and change scores that are registered by now."""
    return (
        Option("parallel", "NAME", f"How the patches work together: {', '.join(strategies())}. Default: as xdit does."),
        Option(
            "patch_degree",
            "N",
            "Number of patches; --ring_degree means the same here. Default: the processes that the other degrees "
            "leave.",
            parse_whole_number,
        ),
        Option(
            "patch_shares",
            "N,N,...|auto",
            "Rows of each patch, or a DiT's tokens, as shares: 3,2 gives the first of two patches 3/5 of them, for a "
            "faster card; auto has every card time a step first. Default: equal.",
            parse_shares_or_auto,
        ),
        Option(
            "otil_quality",
            "HOW",
            f"For people who do not want to know the rest: {', '.join(QUALITIES)}. Default: balanced.",
            setting="quality",
        ),
        *(Option(one.flag, one.metavar, one.help, one.parse, one.name) for one in SETTINGS.values()),
        Option("allow_untested", None, "Try a model that nobody has compared with one process; rank 0 warns."),
        Option("vae", "WHERE", f"{VAE_HELP} Choose from {', '.join(VAE_CHOICES)}. Default: patches.", parse_vae),
        Option("otil_report", "FILE", "Write rank 0's sent bytes and waiting time there, as JSON."),
    )


def given_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that parsed flags give, by their names in `OtilConfig` and ``quality``."""
    flags = {"quality": "otil_quality", **{name: one.flag for name, one in SETTINGS.items()}}
    return {name: values[flag] for name, flag in flags.items() if values.get(flag) is not None}


def add_otil_args(parser: argparse.ArgumentParser) -> None:
    """Add the group "Otil options" to xfuser's parser (or any other); None means that a flag is not given."""
    take_values_with_minus(parser)
    known = strategies()
    summaries = "; ".join(f"{name} ({strategy.summary})" for name, strategy in known.items())
    group = parser.add_argument_group(
        "Otil options", f"One image on several devices, cut by rows into patches that work together by: {summaries}."
    )
    for option in options():
        value: dict[str, Any] = {"metavar": option.metavar, "type": typed(option.parse)}
        if option.metavar is None:  # not "store_true", whose False would look as if it was given
            value = {"action": "store_const", "const": True}
        try:
            group.add_argument(f"--{option.flag}", help=option.help.replace("%", "%%"), **value)
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
