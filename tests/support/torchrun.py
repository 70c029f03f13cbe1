"""A torchrun of a script as a child process, with a deadline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).resolve().parents[1] / "workers"


def lines_of(
    world_size: int, script: str, *arguments: str, timeout: float = 240, may_fail: bool = False
) -> list[dict[str, Any]]:
    """The JSON lines that ``tests/workers/SCRIPT`` prints when `world_size` ranks run it, one thread each.

    Args:
        may_fail: whether an exit code other than 0 is a result, too.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds; no process is left.
        AssertionError: with the end of what it wrote to stderr, when it fails or prints nothing.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, str(WORKERS / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers outlive it otherwise
            raise
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert lines and (may_fail or process.returncode == 0), errors[-4000:]
    return lines
