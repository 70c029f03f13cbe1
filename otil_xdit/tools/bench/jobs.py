"""Starts the processes of a strategy, asks them for images, and leaves none of them behind.

The processes get what torchrun would give them, and no agent of torchrun's besides: those of the strategies that wait
for their turn would wake ten times a second on the cores that are measured.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

from otil_xdit.tools.bench.link import Namespaces
from otil_xdit.tools.bench.protocol import Answer, GatherTask, ImageTask
from otil_xdit.tools.common.processes import Interrupted, rank_environment
from otil_xdit.xdit.launcher.processes import free_port

WORKER = "otil_xdit.tools.bench.worker"

LOOK_SECONDS = 1.0
"""How often a wait is interrupted to see whether a signal came."""

FIRST_PORT = 29500


class JobFailed(RuntimeError):
    """A rank ended, failed or did not answer in time; the message is one line, and `reason` the middle of it."""

    def __init__(self, job: Job, reason: str) -> None:
        super().__init__(f"{job.name}: {reason}; see {job.log}")
        self.reason = reason


@dataclass
class Job:
    """The processes of one strategy.

    Attributes:
        name: for messages.
        processes: by rank.
        log: what they wrote.
        connections: by rank, once they have connected.
    """

    name: str
    processes: list[subprocess.Popen[bytes]]
    log: Path
    connections: dict[int, Connection] = field(default_factory=dict)

    def pause(self) -> None:
        """Stop all processes, between two questions: each of gloo's threads would wake a hundred times a second, and
        xDiT makes some twenty groups of ranks."""
        for process in self.processes:
            process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        for process in self.processes:
            process.send_signal(signal.SIGCONT)

    def memory(self) -> int:
        """Bytes that would be free without it."""
        return sum(psutil.Process(process.pid).memory_full_info().uss for process in self.processes)

    def close(self) -> None:
        """End all processes; they hold nothing that is worth saving."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        for connection in self.connections.values():
            connection.close()
        self.connections.clear()


class Jobs:
    """All processes of a run; made by `jobs_of_a_run`.

    Args:
        folder: for logs.
        address: of the listening Unix socket.
        listener: that socket.
        limit: seconds that any answer may take.
        caught: signals that came.
    """

    def __init__(self, folder: Path, address: str, listener: socket.socket, limit: float, caught: list[int]) -> None:
        self._folder, self._address, self._listener = folder, address, listener
        self._limit, self._caught = limit, caught
        self._jobs: list[Job] = []
        self._started = 0

    def start(self, name: str, task: ImageTask | GatherTask, ranks: int, link: Namespaces | None) -> Job:
        """The processes of a task, loaded; in their namespaces where there is a link and they are several.

        Raises:
            JobFailed: when one of them fails, or does not get there in time; none of them is left.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        log = self._folder / f"{self._started:02d}-{''.join(c if c.isalnum() else '-' for c in name)}.txt"
        link = link if ranks > 1 else None
        port = free_port() if link is None else FIRST_PORT + self._started
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
        shared |= {"MASTER_ADDR": "127.0.0.1"} if link is None else link.environment
        job = Job(name, [], log)
        self._jobs.append(job)
        self._started += 1
        with log.open("wb") as output:
            for rank in range(ranks):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                environment = {**rank_environment(), **shared, **place}
                command = [sys.executable, "-m", WORKER, self._address, str(self._started)]
                job.processes.append(
                    subprocess.Popen(
                        [*([] if link is None else link.inside(rank)), *command],
                        env=environment,
                        start_new_session=True,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                    )
                )
        try:
            self._connect(job)
            for connection in job.connections.values():
                connection.send(task)
            self._collect(job)
        except JobFailed:
            self.close(job)
            raise
        job.pause()
        return job

    def ask(self, job: Job) -> list[Answer]:
        """What all ranks of a job answer, by rank; they run until they have, and are stopped again.

        Raises:
            JobFailed: when one of them ends, fails, or does not answer in time.
        """
        job.resume()
        for rank, connection in job.connections.items():
            try:
                connection.send(None)
            except OSError:
                raise self._ended(job, rank) from None
        answers = self._collect(job)
        job.pause()
        return answers

    def close(self, job: Job) -> None:
        """End a job."""
        job.close()
        self._jobs.remove(job)

    def close_all(self) -> None:
        """End every job."""
        for job in self._jobs:
            job.close()
        self._jobs.clear()

    def _connect(self, job: Job) -> None:
        deadline = time.monotonic() + self._limit
        while len(job.connections) < len(job.processes):
            if not self._ready([self._listener], deadline, job, "did not start"):
                for rank, process in enumerate(job.processes):
                    if process.poll() is not None and rank not in job.connections:
                        raise self._ended(job, rank)
                continue
            connection = Connection(self._listener.accept()[0].detach())
            name, rank = connection.recv()
            assert name == str(self._started), f"rank {rank} of job {name} connects to job {self._started}"
            job.connections[rank] = connection

    def _collect(self, job: Job) -> list[Answer]:
        deadline = time.monotonic() + self._limit
        waiting, answers = dict(job.connections), dict[int, Answer]()
        while waiting:
            ready = self._ready(list(waiting.values()), deadline, job, "did not answer")
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                try:
                    answers[rank] = waiting.pop(rank).recv()
                except (EOFError, OSError):
                    raise self._ended(job, rank) from None
                if "error" in answers[rank]:
                    raise JobFailed(job, f"rank {rank}: {answers[rank]['error']}")
        return [answers[rank] for rank in range(len(job.processes))]

    def _ready(self, sources: Sequence[Any], deadline: float, job: Job, what: str) -> list[Any]:
        """Those of the sources that have something, waited for until the next look."""
        found = wait(sources, LOOK_SECONDS)
        if self._caught:
            raise Interrupted(128 + self._caught[0])
        if not found and time.monotonic() > deadline:
            raise JobFailed(job, f"{what} within {self._limit:g} s")
        return found

    def _ended(self, job: Job, rank: int) -> JobFailed:
        code: int | str = "unknown"
        with suppress(subprocess.TimeoutExpired):
            code = job.processes[rank].wait(LOOK_SECONDS)
        return JobFailed(job, f"rank {rank} ended, exit code {code}")


@contextmanager
def jobs_of_a_run(logs: Path, limit: float, caught: list[int]) -> Iterator[Jobs]:
    """Jobs that are all ended afterwards, whatever happens; a signal in `caught` ends a wait by `Interrupted`."""
    with tempfile.TemporaryDirectory(prefix="otil-bench-") as folder:
        address = str(Path(folder) / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            jobs = Jobs(logs, address, listener, limit, caught)
            try:
                yield jobs
            finally:
                jobs.close_all()
