"""Flags of the tools: type, number of values and the end of the help text come from the default."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")
"""What a network may be told to compute in."""


class FlagAdder:
    """Adds flags to a parser.

    Args:
        parser: of the tool.
    """

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser

    def __call__(self, flag: str, about: str, default: Any = None, metavar: str | None = None, **how: Any) -> None:
        """Add a flag.

        Args:
            flag: with its two dashes.
            about: the help text, to which the default is added where there is one and the text does not name it.
            default: a list for a flag that takes several values. Its type is the values' type.
            metavar: what stands for a value in the usage.
            how: as for `argparse.ArgumentParser.add_argument`.
        """
        values = default if isinstance(default, list) else [] if default is None else [default]
        if isinstance(default, list):
            how.setdefault("nargs", "+")
        if values and not isinstance(values[0], str):
            how.setdefault("type", Path if isinstance(values[0], Path) else type(values[0]))
        if values and "(default " not in about:
            shown = (f"{value:g}" if isinstance(value, float) else str(value) for value in values)
            about += f" (default {' '.join(shown)})"
        if metavar is not None:
            how["metavar"] = metavar
        self._parser.add_argument(flag, help=about, default=default, **how)
