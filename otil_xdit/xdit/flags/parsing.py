"""What command lines need beyond argparse: errors of values as it shows them, and values that begin with a minus."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from otil_xdit.errors import FlagError

T = TypeVar("T")


def check_values(arguments: Iterable[str]) -> None:
    """Refuse ``--flag=--``, of which argparse makes an empty list, whatever the flag takes (Python before 3.13).

    Raises:
        FlagError: naming the flag.
    """
    for argument in arguments:
        flag, has_value, value = argument.partition("=")
        if flag.startswith("--") and has_value and value == "--":
            raise FlagError(f"{argument}: '--' is not a value; give {flag} another one")


def take_values_with_minus(parser: argparse.ArgumentParser) -> None:
    """Have a parser take whatever begins with a minus and a digit for a value, and leave judging it to its flag.

    argparse takes -3 for a number and -3,2 or -1/8 for a flag. Of a flag before it that needs a value it would say
    "expected one argument", whatever the flag accepts. No flag's name begins with a digit.
    """
    parser._negative_number_matcher = re.compile(r"-\.?\d")


def typed(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Wrap `parse` for argparse, which shows the message of `ArgumentTypeError` only."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed
