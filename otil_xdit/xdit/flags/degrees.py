"""How many processes a command line asks for, and how many of them hold patches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from otil_xdit.errors import FlagError

OTHER_DEGREES = ("data_parallel_degree", "use_cfg_parallel", "ulysses_degree")
"""xDiT's flags that multiply with the patch degree to the number of processes."""


def check_at_least(flag: str, value: int, least: int) -> None:
    """Refuse a number that is too small.

    Raises:
        FlagError: naming flag, value and what is accepted.
    """
    if value < least:
        raise FlagError(f"--{flag} {value}: give a whole number from {least} up")


class UngivenDegree(int):
    """A parser's default for a degree: an ordinary int that can be told from the same number given by the user."""


def degree(values: Mapping[str, Any], flag: str) -> int:
    """Return the number of processes that a flag of xDiT multiplies the world by."""
    value = values.get(flag)
    return 2 if value is True else int(value or 1)


def given_patch_degree(values: Mapping[str, Any]) -> int | None:
    """Return the patch degree that the flags name, or None.

    Raises:
        FlagError: when ``--patch_degree`` and ``--ring_degree`` contradict each other, or are below 1.
    """
    ring = values.get("ring_degree")
    degrees = {"--patch_degree": values.get("patch_degree"), "--ring_degree": ring}
    if isinstance(ring, UngivenDegree):
        del degrees["--ring_degree"]
    given = {flag: value for flag, value in degrees.items() if value is not None}
    for flag, value in given.items():
        if value < 1:
            raise FlagError(f"{flag} is {value}; give a whole number from 1 up")
    if len(set(given.values())) > 1:
        both = " and ".join(f"{flag} {value}" for flag, value in given.items())
        raise FlagError(f"{both} contradict each other: with --parallel both name the number of patches; give one")
    return next(iter(given.values()), None)


def resolve_patch_degree(values: Mapping[str, Any], world_size: int | None) -> int:
    """Return the number of patches, which together with the other degrees fills the world.

    Raises:
        FlagError: when it does not, with the arithmetic.
    """
    given = given_patch_degree(values)
    others = math.prod(degree(values, flag) for flag in OTHER_DEGREES)
    if given is None:
        if world_size is None:
            raise FlagError("the number of patches is not known; give --patch_degree N")
        if world_size % others:
            raise FlagError(f"{world_size} processes cannot be shared out: {_product(values)} does not divide them")
        return world_size // others
    if world_size is not None and given * others != world_size:
        factors = " x ".join(filter(None, (f"{given} patches", _product(values))))
        raise FlagError(f"--patch_degree {given} does not fit {world_size} processes: {factors} = {given * others}")
    return given


def _product(values: Mapping[str, Any]) -> str:
    """Write the other degrees as arithmetic: ``2 (--use_cfg_parallel) x 2 (--ulysses_degree)``."""
    degrees = {flag: degree(values, flag) for flag in OTHER_DEGREES}
    return " x ".join(f"{size} (--{flag})" for flag, size in degrees.items() if size > 1)
