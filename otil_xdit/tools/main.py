"""`otil-xdit TOOL`: finds the tool, imports that one only, and runs it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from otil_xdit import __version__
from otil_xdit.xdit.flags.parsing import check_values, take_values_with_minus

TOOLS = {
    "models": "list the models: what runs under --parallel, how, and what is refused",
    "eval": "measure how close each preset's images are to one process's, and the bytes they take",
    "bench": "measure how long a step takes under each strategy, taking turns in one run",
    "plan": "bytes, memory and time of each strategy for a model, a size and a link, before anything is run",
    "check": "whether all is right on this machine, how fast it is, and which flags to use",
    "memory": "how much memory the exchange's copies take on a rank, without weights",
}
"""Name and summary of each tool. The module `cli` of its folder has `add_arguments(parser)` and `run(arguments)`.

`run` gives the exit code, or None for 0. A `ValueError` of either becomes argparse's error: one line, exit code 2.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a tool; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="otil-xdit", allow_abbrev=False, description="Tools around `xfuser --parallel`."
    )
    parser.add_argument("--version", action="version", version=f"otil-xdit {__version__}")
    tools = parser.add_subparsers(metavar="TOOL", required=True)
    for name, summary in TOOLS.items():
        tool = tools.add_parser(name, allow_abbrev=False, help=summary, description=summary)
        if name in given[:1]:  # the others' modules import much, and nobody asked for them
            module = import_module(f"otil_xdit.tools.{name}.cli")
            take_values_with_minus(tool)
            module.add_arguments(tool)
            tool.set_defaults(run=module.run, tool=tool)
    try:
        check_values(given)
    except ValueError as error:
        parser.error(str(error))
    parsed = parser.parse_args(given)
    try:
        code: int = parsed.run(parsed) or 0
        sys.stdout.flush()
    except ValueError as error:
        parsed.tool.error(str(error))
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. What Python still wants to flush when it ends must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


if __name__ == "__main__":
    sys.exit(main())
