"""Processes forked from servers that have imported torch, diffusers and xfuser already.

Importing them takes 4 s of CPU, which each rank of each test would pay anew. A server pays it once a pytest session and
forks a process, which is a rank like any other, in some 0.02 s: it has its own session, environment, folder, output and
exit code, and has seen nothing of the processes before it, because a server does nothing but import and fork.

There are two servers, so that neighbouring ranks hash strings differently (PYTHONHASHSEED), as processes of their own
do: a program whose ranks go through a set in the order of its hashes must fail here, too.

Where there is an accelerator, servers import nothing: CUDA does not survive a fork.
"""

from __future__ import annotations

import functools
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SERVERS = 2
PATIENCE = 400.0
"""Seconds that a server may take to import, on a busy machine."""
NUMBER = struct.Struct("q")


class ForkedProcess:
    """A process that a server has forked, as seen from the tests.

    Args:
        report: where it writes its process id, and the server its exit code, as `NUMBER`.

    Attributes:
        pid: its process id, and its session's and group's.
        exit_code: None while it runs; minus the number of the signal that has ended it.

    Raises:
        RuntimeError: when the server has ended; what it wrote to stderr says why.
    """

    def __init__(self, report: socket.socket) -> None:
        self._report = report
        self.exit_code: int | None = None
        self.pid = self._number()

    def wait(self, timeout: float) -> int | None:
        """Return the exit code, or None when the process still runs after `timeout` seconds."""
        if self.exit_code is None and select.select([self._report], [], [], timeout)[0]:
            self.exit_code = self._number()
            self._report.close()
        return self.exit_code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and all that it has started in its group, if it still runs."""
        if self.wait(0) is None:
            os.killpg(self.pid, number)

    def _number(self) -> int:
        number = self._report.recv(NUMBER.size, socket.MSG_WAITALL)
        if not number:
            raise RuntimeError("the fork server has ended")
        return int(NUMBER.unpack(number)[0])


def kill_all(processes: Sequence[ForkedProcess]) -> None:
    """Kill those that still run, with all that they have started in their groups."""
    for process in processes:
        process.signal(signal.SIGKILL)
    for process in processes:
        process.wait(PATIENCE)


class ForkServer:
    """A server, as seen from the tests.

    Args:
        preload: whether it imports what ranks need.
    """

    def __init__(self, preload: bool = True) -> None:
        self._requests, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno())]
        self._process = subprocess.Popen(
            [*command, "--preload"] if preload else command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C ends the tests, and their end ends the server
        )
        theirs.close()

    def fork(
        self,
        function: Callable[..., object],
        *args: object,
        environment: Mapping[str, str],
        path: list[str] | None = None,
        output: int = 1,
        errors: int = 2,
    ) -> ForkedProcess:
        """Call ``function(*args)`` in a forked process, in this process's folder.

        Args:
            function, args: must pickle, a function by its name.
            environment: all of the process's environment variables.
            path: its ``sys.path``; a fresh process's if it is None.
            output, errors: descriptors of its stdout and stderr.
        """
        call = pickle.dumps((function, args))  # in itself: it is read when the process has its path
        order = {"environment": dict(environment), "folder": os.getcwd(), "path": path, "call": call}
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE)
        with tempfile.TemporaryFile() as file, theirs:
            pickle.dump(order, file)
            file.seek(0)
            socket.send_fds(self._requests, [b"."], [file.fileno(), theirs.fileno(), output, errors])
        return ForkedProcess(ours)

    def close(self) -> None:
        """End the server and the processes that it has forked."""
        self._requests.close()
        self._process.wait(PATIENCE)


@functools.cache
def servers() -> list[ForkServer]:
    """Return this session's servers, started at the first call."""
    from otil_xdit.xdit.cpu import has_accelerator

    return [ForkServer(preload=not has_accelerator()) for _ in range(SERVERS)]


def server(number: int) -> ForkServer:
    """Return the server of a process by its number among those that run together."""
    return servers()[number % SERVERS]


def stop_servers() -> None:
    """End this session's servers, if there are any."""
    if servers.cache_info().currsize:
        for one in servers():
            one.close()
        servers.cache_clear()


# ---- the server's side -----------------------------------------------------------------------------------------------


def main() -> None:
    """Import, then serve; in a forked process, do what it was forked for."""
    if "--preload" in sys.argv:
        preload()
    work = serve(socket.socket(fileno=int(sys.argv[1])))
    if work is None:
        os._exit(0)  # without Triton's bindings writing a page about what they leak
    work()


def preload() -> None:
    """Import what ranks import, as they do: xfuser can only be imported on a CPU after `enable_cpu_ranks`."""
    import gc

    from otil_xdit.xdit.cpu import enable_cpu_ranks

    enable_cpu_ranks()
    import peft  # noqa: F401
    import xfuser.runner  # noqa: F401
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: F401

    gc.collect()
    gc.freeze()  # forked processes need not look through all that again


def serve(requests: socket.socket) -> Callable[[], object] | None:
    """Fork a process for each request until the tests are gone, and leave none behind.

    Returns:
        In a forked process, what it has to do. None in the server, at its end.
    """
    reports: dict[int, int] = {}
    while True:
        while reports and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            report = reports.pop(ended[0])
            with suppress(BrokenPipeError):  # nobody asks any more
                os.write(report, NUMBER.pack(os.waitstatus_to_exitcode(ended[1])))
            os.close(report)
        if not select.select([requests], [], [], 0.02 if reports else None)[0]:
            continue
        _, descriptors, *_ = socket.recv_fds(requests, 1, 4)
        if not descriptors:  # the tests have ended, or were killed
            for pid in reports:
                with suppress(ProcessLookupError):  # it has not become a group yet
                    os.killpg(pid, signal.SIGKILL)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return None
        pid = os.fork()
        if not pid:
            requests.close()
            for report in reports.values():
                os.close(report)
            return become(*descriptors)
        order, reports[pid], output, errors = descriptors
        for descriptor in (order, output, errors):
            os.close(descriptor)


def become(order: int, report: int, output: int, errors: int) -> Callable[[], object]:
    """Make this forked process one of its own, and return what it has to do."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(errors, 2)
    os.write(report, NUMBER.pack(os.getpid()))
    with open(order, "rb") as file:
        told: dict[str, Any] = pickle.load(file)
    for descriptor in (report, output, errors):
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(told["environment"])
    os.chdir(told["folder"])
    if told["path"] is not None:
        sys.path[:] = told["path"]
    if "torch" in sys.modules:  # seeds are drawn at import; Python draws its own anew in a fork
        sys.modules["torch"].seed()
        sys.modules["numpy"].random.seed()
    function, args = pickle.loads(told["call"])
    return partial(function, *args)


if __name__ == "__main__":
    main()
