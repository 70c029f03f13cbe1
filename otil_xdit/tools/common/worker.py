"""What each rank runs that a tool starts: it loads a task, and then answers whenever it is asked.

    python -m otil_xdit.tools.common.worker SOCKET JOB      (with torchrun's RANK, WORLD_SIZE, MASTER_ADDR, ...)

`otil_xdit.tools.common.jobs` asks it through a Unix socket, which works from any network namespace, and stops it by a
signal between two questions. When whoever asks is gone, it ends. Nothing large is imported before the rank is pinned.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

Answer = dict[str, Any]
"""What a rank says; ``error`` and ``time`` (seconds since the epoch) when something went wrong, and then it ends."""

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl.h."""


class Task(Protocol):
    """What ranks are started for. It is pickled, so it holds plain data."""

    def load(self) -> Callable[[Any], Answer]:
        """Return what answers a question, on one rank; both are pickled too."""


def main() -> None:
    """Connect, load, and answer until nobody asks any more."""
    path, job = sys.argv[1:]
    rank = int(os.environ["RANK"])
    _end_with_parent()
    _pin(rank)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        connection = Connection(client.detach())
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # whoever asks has ended, so shall this
        connection.send((job, rank))
        _answer(connection)


def _answer(connection: Connection) -> None:
    try:
        task: Task = connection.recv()
        _take_device()
        answer = task.load()
        connection.send({})
        while True:
            connection.send(answer(connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        traceback.print_exc()  # before whoever asks is told, and ends this process
        connection.send({"error": last_line(error), "time": time.time()})
        sys.exit(1)


def _end_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends: a stopped one would not see that."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _pin(rank: int) -> None:
    """Pin rank r to core r modulo the cores, before any library starts threads; not where a GPU computes."""
    if not os.path.exists("/dev/nvidia0") and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})


def _take_device() -> None:
    """Take the rank's GPU, or one thread where there is none."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)


def last_line(error: Exception) -> str:
    """Return an error's kind and the last line of what it says; where it says nothing, where it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {lines[-1] if lines else f'{Path(place.filename).name}: {place.line}'}"


if __name__ == "__main__":
    main()
