"""Run torchrun and its ranks as a child, and leave none of them behind."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from otil_xdit.xdit.launcher.orphans import PARENT

CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # glibc would give large tensors back to the system and fetch them again at every step.
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""What ranks without an accelerator run best with, unless the user says otherwise."""

LAUNCH_MARK = "OTIL_XDIT_LAUNCH"
"""Environment variable that all processes of one launch share. Neither the process group nor the tree tells them
reliably: torchrun starts every rank in a session of its own, and they get another parent when torchrun dies."""

POLL_SECONDS = 0.1
PATIENCE_SECONDS = 5.0


def run_to_end(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end.

    On SIGINT or SIGTERM, and however the command ends, everything that it has started is ended too.

    Args:
        command, environment: what to run.

    Returns:
        The exit code as a shell gives it.
    """
    with caught_signals() as caught:
        process, mark = start(command, environment)
        try:
            while process.poll() is None and not caught:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
        finally:
            stop(process, mark)
    if caught:
        print(f"xfuser: {signal.Signals(caught[0]).name}, all processes stopped", file=sys.stderr)
        return 128 + caught[0]
    ended = process.returncode
    if ended < 0:
        print(f"xfuser: torchrun was ended by {signal.Signals(-ended).name}, all processes stopped", file=sys.stderr)
    return ended if ended >= 0 else 128 - ended


def start(
    command: Sequence[str], environment: Mapping[str, str], **options: Any
) -> tuple[subprocess.Popen[bytes], str]:
    """Start torchrun, to be ended by `stop`, and together with this process.

    Args:
        command, environment: what to run.
        options: of `subprocess.Popen`.

    Returns:
        The process, and the mark that all processes of this launch have.
    """
    mark = uuid.uuid4().hex
    marks = {LAUNCH_MARK: mark, PARENT: str(os.getpid())}
    process = subprocess.Popen(command, env={**environment, **marks}, start_new_session=True, **options)
    return process, mark


def visible_devices() -> int:
    """Return how many accelerators this machine offers."""
    torch = importlib.import_module("torch")
    devices = (getattr(torch, name, None) for name in ("cuda", "musa", "npu"))
    return next((int(device.device_count()) for device in devices if device is not None and device.is_available()), 0)


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM in the list, instead of letting them end this process."""
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


def stop(process: subprocess.Popen[bytes], mark: str) -> None:
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
    """Return the processes of a launch."""
    marked = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(LAUNCH_MARK) == mark:
                marked.append(process)
    return marked
