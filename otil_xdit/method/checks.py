"""Validation of settings: each check raises `ValueError` naming the setting, its value and what is accepted."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any


def parse_ratio(text: str) -> float:
    """Read ``"1/8"`` or ``"0.125"``.

    Raises:
        ValueError: for anything else, or a number outside (0, 1].
    """
    try:
        value = float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not a ratio; give a fraction such as 1/8 or a number such as 0.125") from None
    check_number("ratio", value, above=0.0, up_to=1.0)
    return value


def parse_whole_number(text: str) -> int:
    """Read an integer.

    Raises:
        ValueError: for anything else.
    """
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a whole number") from error


def parse_switch(text: str) -> bool:
    """Read ``"yes"`` or ``"no"``.

    Raises:
        ValueError: for anything else.
    """
    if text not in ("yes", "no"):
        raise ValueError(f"{text!r} is neither yes nor no")
    return text == "yes"


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a value that is not among `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose from {', '.join(map(str, choices))}")


def check_number(name: str, value: Any, above: float | None, up_to: float) -> None:
    """Refuse what is no number in (above, up_to], or in [0, up_to] where `above` is None."""
    low_end = "[0" if above is None else f"({above:g}"
    accepted = f"a number in {low_end}, {up_to:g}{')' if math.isinf(up_to) else ']'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(f"{name} is {value!r}; give {accepted}")
    too_low = value < 0 if above is None else value <= above
    if too_low or value > up_to or math.isinf(value):
        raise ValueError(f"{name} is {value:g}; give {accepted}")


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Refuse what is no whole number from `low` to `high`, or up where `high` is None."""
    accepted = f"a whole number from {low}" + (f" to {high}" if high is not None else " up")
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{name} is {value!r}; give {accepted}")
