"""Runs torchrun and its ranks as a child, and leaves none of them behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import psutil

LAUNCH_MARK = "OTIL_XDIT_LAUNCH"
"""Environment variable that all processes of one launch share. Neither the process group nor the tree tells them
reliably: torchrun starts every rank in a session of its own, and they get another parent when torchrun dies."""

POLL_SECONDS = 0.1
PATIENCE_SECONDS = 5.0


def run_to_end(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command; its exit code as a shell gives it.

    On SIGINT or SIGTERM, and however the command ends, everything that it has started is ended too.
    """
    mark = uuid.uuid4().hex
    with _caught_signals() as caught:
        process = subprocess.Popen(command, env={**environment, LAUNCH_MARK: mark}, start_new_session=True)
        while process.poll() is None and not caught:
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
        _stop(process, mark)
    if caught:
        print(f"xfuser: {signal.Signals(caught[0]).name}, all processes stopped", file=sys.stderr)
        return 128 + caught[0]
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in the list instead of ending this process."""
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda signum, frame: caught.append(signum))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(process: subprocess.Popen[bytes], mark: str) -> None:
    """End the command and all that carries its mark, without torchrun's reports of dying ranks."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGSTOP)  # so that it starts nothing while its ranks are looked for
    ranks = [found for found in _marked(mark) if found.pid != process.pid]
    process.kill()
    process.wait()
    for found in ranks:
        with suppress(psutil.Error):
            found.terminate()
    _, alive = psutil.wait_procs(ranks, timeout=PATIENCE_SECONDS)
    for found in alive:
        with suppress(psutil.Error):
            found.kill()
    psutil.wait_procs(alive, timeout=PATIENCE_SECONDS)


def _marked(mark: str) -> list[psutil.Process]:
    marked = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(LAUNCH_MARK) == mark:
                marked.append(process)
    return marked
