"""`otil-xdit check`: whether this package is right, and how fast, on this machine; and the flags to use."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from otil_xdit.catalog.bundled import BUNDLED
from otil_xdit.tools.check import advice, cards, exactness, kernels, kill, links, repeats, speed
from otil_xdit.tools.check.random_pipes import BUILDERS
from otil_xdit.tools.check.report import JSON, PAGE, write
from otil_xdit.tools.check.runner import Check, Part, run_parts
from otil_xdit.tools.check.settings import Settings
from otil_xdit.tools.common.flags import FlagAdder
from otil_xdit.tools.common.jobs import Interrupted, jobs_of_a_run
from otil_xdit.xdit.launcher.processes import caught_signals, visible_devices

START_SECONDS = 50.0
"""For ranks to start."""

PARTS = (
    Part("cards", 50, "the devices and what drives them", cards.run),
    Part("links", 30, "which cards reach each other, and bandwidth between all ranks", links.run),
    Part("exactness", 90, "sync against one process, shipped models, float32 and on cards bfloat16", exactness.run),
    Part("kernels", 50, "fused kernels against the eager code, on cards", kernels.run),
    Part("repeats", 90, "the same images twice", repeats.run),
    Part("speed", 110, "ms a step by strategy, with launches and gaps", speed.run),
    Part("kill", 50, "kill -9 of a rank", kill.run),
    Part("advice", 10, "the flags to use", advice.run),
)
"""In their order; their seconds, of which the first one's are for the start of the ranks, are 8 minutes together."""

_NAMES = [part.name for part in PARTS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags: which parts, on how many ranks, and how much of each."""
    add = FlagAdder(parser)
    budgets = ", ".join(f"{part.name} ({part.seconds:g} s: {part.about})" for part in PARTS)
    add("--parts", f"what to check, each within its time: {budgets} (default all)", _NAMES, choices=_NAMES)
    add("--ranks", "processes (default one a card; two on one card or none)", None, "N", type=int)
    about = f"whose steps are timed: {', '.join(BUNDLED)}; on cards {', '.join(BUILDERS)} with random weights too"
    add("--models", f"{about} (default those, and without cards tiny-sd tiny-dit)", None, "MODEL", nargs="+")
    add("--images", "drawn twice and compared (default 100, without cards 3)", None, "N", type=int)
    add("--steps", "of every image", 8, "N")
    add("--rounds", "images of each strategy that are timed", 3, "N")
    add("--timeout", "within which a killed rank must be named", 20.0, "SECONDS")
    add("--out", f"for {JSON}, {PAGE} and the ranks' logs", Path("check"), "FOLDER")


def run(arguments: argparse.Namespace) -> int:
    """Check; print a line for each part as it ends, and write both files after each.

    Returns:
        1 where a part failed, 0 otherwise.

    Raises:
        ValueError: for arguments that cannot be run, before ranks are started.
    """
    given = {name: getattr(arguments, name) for name in ("ranks", "models", "images", "steps", "rounds", "timeout")}
    settings = Settings.of(visible_devices(), **given)
    out: Path = arguments.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    parts = [part for part in PARTS if part.name in arguments.parts]
    command = shlex.join(["otil-xdit", *sys.argv[1:]])
    results = []
    try:
        with caught_signals() as caught, jobs_of_a_run(out / "logs", START_SECONDS, caught) as jobs:
            for result in run_parts(parts, Check(settings, jobs)):
                results.append(result)
                name, state = result.part.name, result.state
                print(f"{name:10} {state:8} {result.seconds:4.0f} s  {result.finding.said}", flush=True)
                write(results, settings, command, out)
    except Interrupted as error:
        print(f"otil-xdit check: {error}", file=sys.stderr)
        return error.code
    print(f"{out / PAGE} and {out / JSON} have the whole of it.")
    return int(any(result.state == "failed" for result in results))
