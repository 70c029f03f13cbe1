"""Starts the ranks of a job, asks them, and leaves none of them behind.

The ranks get what torchrun would give them, and no agent of torchrun's besides: those of the jobs that wait for their
turn would wake ten times a second on the cores that are measured.
"""

from __future__ import annotations

import os
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
from typing import Any, Protocol

import psutil

from otil_xdit.tools.common.worker import Answer, Task
from otil_xdit.xdit.cpu import has_accelerator
from otil_xdit.xdit.launcher.processes import CPU_ENVIRONMENT, free_port

WORKER = "otil_xdit.tools.common.worker"

LOOK_SECONDS = 1.0
"""How often a wait is interrupted to see whether a signal came."""

FIRST_PORT = 29500
"""Port of the first job's rendezvous in a network of its own, where every port is free."""


class JobFailed(RuntimeError):
    """A rank ended, failed or did not answer in time; the message is one line.

    Attributes:
        reason: the rank and what it did, without the job's name.
        log: all that the ranks wrote.
        code: this process's exit code.
    """

    code = 1

    def __init__(self, job: Job, reason: str) -> None:
        super().__init__(f"{job.name}: {reason}; see {job.log}")
        self.reason, self.log = reason, job.log


class Interrupted(Exception):
    """SIGINT or SIGTERM came while ranks ran; all of them are stopped. `code` is this process's exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name}, all processes stopped")
        self.code = 128 + number


class Network(Protocol):
    """What joins a job's ranks in place of this machine's loopback."""

    def inside(self, rank: int) -> Sequence[str]:
        """Return what to put before a command that shall run where a rank is."""

    @property
    def environment(self) -> dict[str, str]:
        """What the ranks' processes need to find each other."""


@dataclass
class Job:
    """The ranks of one task.

    Attributes:
        name: for messages.
        number: of the job in its run, from 0.
        log: what the ranks write.
        processes: by rank.
        connections: by rank, once they have connected.
    """

    name: str
    number: int
    log: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    connections: dict[int, Connection] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.processes)

    def pause(self) -> None:
        """Stop all ranks between two questions.

        Each of gloo's threads would wake a hundred times a second, and xDiT makes some twenty groups of ranks.
        """
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let the ranks go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)

    def memory(self) -> int:
        """Return how many bytes would be free without the job."""
        return sum(psutil.Process(process.pid).memory_full_info().uss for process in self.processes)

    def close(self) -> None:
        """End all ranks; they hold nothing that is worth saving."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        for connection in self.connections.values():
            connection.close()
        self.connections.clear()


class Jobs:
    """All jobs of a run; made by `jobs_of_a_run`.

    Args:
        folder: for logs.
        listener: a listening Unix socket.
        limit: seconds that any answer may take.
        caught: signals that came.
        network: what joins the ranks of a job of several; None for loopback.
    """

    def __init__(
        self, folder: Path, listener: socket.socket, limit: float, caught: list[int], network: Network | None
    ) -> None:
        self._folder, self._listener, self._limit = folder, listener, limit
        self._caught, self._network = caught, network
        self._jobs: list[Job] = []
        self._started = 0

    def start(self, name: str, task: Task, ranks: int) -> Job:
        """Start a task's ranks and wait until they have loaded it.

        Args:
            name: of the job, for messages and its log.
            task: what each rank loads.
            ranks: how many.

        Raises:
            JobFailed: when a rank fails, or does not get there in time; none of them is left.
            Interrupted: after a signal.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        file = f"{self._started:02d}-{''.join(c if c.isalnum() else '-' for c in name)}.txt"
        job = Job(name, self._started, self._folder / file)
        self._jobs.append(job)
        self._started += 1
        self._launch(job, ranks)
        try:
            self._connect(job)
            self._exchange(job, [task] * ranks)
        except JobFailed:
            self.close(job)
            raise
        return job

    def ask(self, job: Job, questions: Sequence[Any] = (), limit: float | None = None) -> list[Answer]:
        """Return what all ranks of a job answer, by rank; they run until they have, and are stopped again.

        Args:
            job: that has been started.
            questions: by rank; ranks that are left are asked None.
            limit: seconds that the answers may take; None for the run's.

        Raises:
            JobFailed: when a rank ends, fails, or does not answer in time.
            Interrupted: after a signal.
        """
        job.resume()
        return self._exchange(job, [*questions, *[None] * (job.ranks - len(questions))], limit)

    def close(self, job: Job) -> None:
        """End a job."""
        job.close()
        self._jobs.remove(job)

    def close_all(self) -> None:
        """End every job."""
        for job in list(self._jobs):
            self.close(job)

    def _launch(self, job: Job, ranks: int) -> None:
        network = self._network if ranks > 1 else None
        port = free_port() if network is None else FIRST_PORT + job.number
        shared = {**({} if has_accelerator() else CPU_ENVIRONMENT), **os.environ}
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
        shared |= {"MASTER_ADDR": "127.0.0.1"} if network is None else network.environment
        command = [sys.executable, "-m", WORKER, self._listener.getsockname(), str(job.number)]
        with job.log.open("wb") as output:
            for rank in range(ranks):
                process = subprocess.Popen(
                    [*([] if network is None else network.inside(rank)), *command],
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
                job.processes.append(process)

    def _connect(self, job: Job) -> None:
        deadline = time.monotonic() + self._limit
        while missing := [rank for rank in range(job.ranks) if rank not in job.connections]:
            if self._ready([self._listener], deadline, job, missing, f"did not start within {self._limit:g} s"):
                self._accept(job)
                continue
            for rank in missing:
                if job.processes[rank].poll() is not None:
                    raise self._ended(job, rank)

    def _accept(self, job: Job) -> None:
        """Take up a rank's connection, unless it is one of a job that has been closed."""
        connection = Connection(self._listener.accept()[0].detach())
        with suppress(EOFError, OSError):
            number, rank = connection.recv()
            if number == str(job.number):
                job.connections[rank] = connection
                return
        connection.close()

    def _exchange(self, job: Job, questions: Sequence[Any], limit: float | None = None) -> list[Answer]:
        """Send a message to each rank, wait for all answers, and stop the ranks."""
        limit = self._limit if limit is None else limit
        for rank, connection in job.connections.items():
            try:
                connection.send(questions[rank])
            except OSError:
                raise self._ended(job, rank) from None
        deadline = time.monotonic() + limit
        waiting, answers = dict(job.connections), dict[int, Answer]()
        while waiting:
            ready = self._ready(
                list(waiting.values()), deadline, job, sorted(waiting), f"gave no answer within {limit:g} s"
            )
            heard = {rank: self._hear(job, rank) for rank, one in waiting.items() if one in ready}
            failed = [rank for rank in heard if "error" in heard[rank]]
            if failed:  # one rank's failure makes others fail a little later
                first = min(failed, key=lambda rank: heard[rank]["time"])
                raise JobFailed(job, f"rank {first}: {heard[first]['error']}")
            answers |= heard
            waiting = {rank: one for rank, one in waiting.items() if rank not in heard}
        job.pause()
        return [answers[rank] for rank in range(job.ranks)]

    def _hear(self, job: Job, rank: int) -> Answer:
        try:
            answer: Answer = job.connections[rank].recv()
        except (EOFError, OSError):
            raise self._ended(job, rank) from None
        return answer

    def _ready(self, sources: Sequence[Any], deadline: float, job: Job, ranks: Sequence[int], what: str) -> list[Any]:
        """Return those of the sources that have something, waited for until the next look; `ranks` are blamed."""
        found = wait(sources, LOOK_SECONDS)
        if self._caught:
            raise Interrupted(self._caught[0])
        if not found and time.monotonic() > deadline:
            blamed = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
            raise JobFailed(job, f"{blamed} {what}")
        return found

    def _ended(self, job: Job, rank: int) -> JobFailed:
        code: int | str = "unknown"
        with suppress(subprocess.TimeoutExpired):
            code = job.processes[rank].wait(LOOK_SECONDS)
        return JobFailed(job, f"rank {rank} ended, exit code {code}")


@contextmanager
def jobs_of_a_run(logs: Path, limit: float, caught: list[int], network: Network | None = None) -> Iterator[Jobs]:
    """Yield jobs that are all ended afterwards, whatever happens.

    Args:
        logs: folder for what the ranks write.
        limit: seconds that starting a job, or any answer, may take.
        caught: signals that came; one of them ends a wait by `Interrupted`.
        network: what joins the ranks of a job of several; None for loopback.
    """
    with tempfile.TemporaryDirectory(prefix="otil-xdit-") as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(Path(folder) / "socket"))
        listener.listen()
        jobs = Jobs(logs, listener, limit, caught, network)
        try:
            yield jobs
        finally:
            jobs.close_all()
