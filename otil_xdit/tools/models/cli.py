"""`otil-xdit models`: what runs under ``--parallel``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from otil_xdit import __version__
from otil_xdit.catalog.dits import why_refused
from otil_xdit.catalog.models import find_record
from otil_xdit.catalog.pipelines import REFUSED, SUPPORTED, WRAPPED_PIPELINES
from otil_xdit.xdit.launcher.runner_registry import model_registry
from otil_xdit.xdit.versions import TESTED_XFUSER

HEADER = f"""\
otil-xdit {__version__}, tested with xfuser {TESTED_XFUSER}.
`xfuser --model` also takes the folder of a text-to-image U-Net in diffusers' format.

exact     a tiny network of the architecture gave diffusers' latents under --parallel sync; see docs/supported-models.md
untested  nobody has compared it; refused without --allow_untested
refused   ends with an error that says why
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no flags."""


def run(arguments: argparse.Namespace) -> None:
    """Print the tables."""
    print_models()


def print_models() -> None:
    """Print what `xfuser --model` takes, and the pipelines of xDiT and of diffusers that need a script."""
    print(HEADER)
    print_table(("xfuser --model", "--parallel", "--use_cfg_parallel", "note"), runner_rows(model_registry()))
    print()
    rows = [(name, state, "", note) for name, state, note in WRAPPED_PIPELINES]
    print_table(("pipeline of xDiT, in a script", "--parallel", "", "note"), rows)
    print()
    unets = [(name, "yes", "") for name in SUPPORTED] + [(name, "refused", why) for name, why in REFUSED.items()]
    print_table(("U-Net pipeline of diffusers, in a script", "", "note"), unets)


def runner_rows(models: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each model class of xfuser's registry, under its shortest name; what runs comes first."""
    names: dict[type, list[str]] = {}
    for name, model in models.items():
        names.setdefault(model, []).append(name)
    rows = [model_row(min(known, key=len), model) for model, known in names.items()]
    return sorted(rows, key=lambda row: (("exact", "untested", "refused").index(row[1]), row[0].lower()))


def model_row(name: str, model: Any) -> tuple[str, str, str, str]:
    """Return name, state, CFG parallelism and note."""
    record = find_record(name)
    state, note = ("untested", "") if record is None else (record.state, record.note)
    why_not = why_refused(record, model.capabilities, allow_untested=True)
    if why_not is not None:
        return name, "refused", "", why_not
    cfg_parallel = "yes" if model.capabilities.use_cfg_parallel else "no"
    return name, state, "" if state == "refused" else cfg_parallel, note


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns as wide as they need to be."""
    lines = [titles, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
