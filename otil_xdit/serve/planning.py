"""Find out how to start the ranks, in a process of its own: checking the flags imports xfuser, torch and diffusers.

The server's process imports none of them: it takes 56 MB, torch alone 281, and nothing of a card's driver is in it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from otil_xdit.errors import FlagError

RANKS = "otil_xdit.serve.ranks"
"""The module that every rank runs."""

NOT_SERVED = {
    "prompt": "requests bring their prompts; the one of the first image is --warmup_prompt",
    "negative_prompt": "requests bring theirs",
    "dataset_path": "requests bring their prompts",
    "data_parallel_degree": "a server makes one image at a time on all of its ranks; start one server for each group",
    "batch_size": "--max_batch is the server's",
    "num_iterations": "a request is one image",
    "warmup_calls": "the server makes an image before the first request",
    "output_directory": "images go to the clients",
    "profile": "it ends with the first image",
}
"""Flags of the launcher that have no meaning here, and why."""

_MARK = "otil-xdit launch: "


@dataclass(frozen=True)
class RanksLaunch:
    """How to start the ranks of this machine; see `otil_xdit.xdit.launcher.main.Launch`."""

    command: tuple[str, ...]
    environment: dict[str, str]
    note: str | None = None


def check_served(arguments: Sequence[str]) -> None:
    """Refuse flags that make no sense for a server.

    Raises:
        FlagError: naming the flag and the reason.
    """
    for argument in arguments:
        name = argument[2:].partition("=")[0].replace("-", "_") if argument.startswith("--") else ""
        if name in NOT_SERVED:
            raise FlagError(f"--{name} does not go together with serve: {NOT_SERVED[name]}")


def plan_ranks(arguments: Sequence[str], warmup_prompt: str) -> RanksLaunch:
    """Check the launcher's flags in a child process, and return what it would start.

    Raises:
        FlagError: with what the child said.
    """
    check_served(arguments)
    own = ["--prompt", warmup_prompt, "--output_directory", tempfile.gettempdir()]
    child = subprocess.run([sys.executable, "-m", __name__, *arguments, *own], capture_output=True, text=True)
    lines = [line for line in child.stdout.splitlines() if line.startswith(_MARK)]
    if child.returncode != 0 or not lines:
        said = child.stderr.strip().splitlines() or [f"the flags' check ended with exit code {child.returncode}"]
        raise FlagError(said[-1].removeprefix("xfuser: error: "))
    sys.stderr.write(child.stderr)
    values = json.loads(lines[-1].removeprefix(_MARK))
    return RanksLaunch(tuple(values["command"]), values["environment"], values["note"])


def main() -> int:
    """Print the launch of this process's arguments, or what is wrong with them."""
    from otil_xdit.xdit.launcher.main import plan

    logging.basicConfig(format="xfuser: %(message)s", level=logging.WARNING)
    try:
        launch = plan(sys.argv[1:], os.environ, RANKS)
    except FlagError as error:
        print(f"xfuser: error: {error}", file=sys.stderr)
        return 2
    values = {"command": launch.command, "environment": dict(launch.environment), "note": launch.note}
    print(_MARK + json.dumps(values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
