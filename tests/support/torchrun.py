"""A script of `tests/workers` on several ranks, as a torchrun runs it, with a deadline."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.support.fork_server import ForkedProcess, kill_all, server

WORKERS = Path(__file__).resolve().parents[1] / "workers"
LEAKS = re.compile(r"(?m)^(nanobind: .*| - leaked .*| - [.]{3} skipped remainder)\n|See https://nanobind\S+?html")
"""Lines that Triton's bindings write at the end of a process."""

GRACE = 30.0
"""Seconds that torchrun gives the other ranks to end when one has failed."""


def lines_of(
    world_size: int, script: str, *arguments: str, timeout: float = 240, may_fail: bool = False
) -> list[dict[str, Any]]:
    """Return the JSON lines that ``tests/workers/SCRIPT`` prints when `world_size` ranks run it, one thread each.

    The ranks are forked processes (`tests.support.fork_server`) with the environment that a torchrun gives them, and
    like its agent this process has the store in which they meet.

    Args:
        may_fail: whether an exit code other than 0 is a result, too.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds; no process is left.
        AssertionError: with the end of what they wrote to stderr, when one fails or none prints anything.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        ranks = [
            server(rank).fork(
                run_script,
                str(WORKERS / script),
                arguments,
                environment={**os.environ, **rank_environment(rank, world_size, store.port)},
                output=output.fileno(),
                errors=errors.fileno(),
            )
            for rank in range(world_size)
        ]
        in_time = False
        try:
            in_time = end_together(ranks, timeout)
        finally:
            kill_all(ranks)
        output.seek(0)
        errors.seek(0)
        written = LEAKS.sub("", errors.read())[-4000:]
        if not in_time:
            raise subprocess.TimeoutExpired(script, timeout, stderr=written)
        lines = [json.loads(line) for line in output if line.startswith("{")]
        codes = [rank.exit_code for rank in ranks]
        if any(codes):  # where only the lines count, this tells why one is missing
            print(f"exit codes {codes}\n{written}", file=sys.stderr)
        assert lines and (may_fail or not any(codes)), f"exit codes {codes}\n{written}"
    return lines


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets and a rank reads; the store is this process's, not rank 0's."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
    }


def run_script(script: str, arguments: tuple[str, ...]) -> None:
    """Do what ``python SCRIPT ARGUMENTS`` does."""
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def end_together(ranks: list[ForkedProcess], timeout: float) -> bool:
    """Wait until all ranks have ended, at most `timeout` seconds; when one fails, end the others as torchrun does.

    Returns:
        Whether they have ended, or one has failed, in time.
    """
    deadline = time.monotonic() + timeout
    while all(rank.exit_code in (None, 0) for rank in ranks):
        if all([rank.wait(0.05) == 0 for rank in ranks]):  # a list: each of them is asked
            return True
        if time.monotonic() > deadline:
            return False
    for rank in ranks:
        rank.signal(signal.SIGTERM)
    last = time.monotonic() + GRACE
    while any([rank.wait(0.05) is None for rank in ranks]) and time.monotonic() < last:
        pass
    return True
