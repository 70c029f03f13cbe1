"""`Jobs`: the bounded queue of requests, and the one task that has their images made in turn."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from otil_xdit.serve.engine import Cancelled, Engine, EngineFailure, Refused
from otil_xdit.serve.job import Job, Stage
from otil_xdit.serve.requests import DrawnImage, ImageRequest, StepDone

logger = logging.getLogger(__name__)

SECONDS_UNKNOWN = 10.0
"""What an image is taken to need before one has been made."""


class QueueFull(Exception):
    """As many requests wait as may.

    Args:
        retry_after: seconds until there is probably room.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class Jobs:
    """The queue, and the task that empties it.

    Args:
        engine: makes the images.
        limit: jobs that may wait.
        seconds: that a job may take, waiting included.
        on_image: called with each image that is done.
        most: images to make in one call of the pipeline, where they go with each other.
    """

    def __init__(
        self,
        engine: Engine,
        limit: int,
        seconds: float,
        on_image: Callable[[DrawnImage], None] = lambda image: None,
        most: int = 1,
    ) -> None:
        self._engine, self._limit, self._seconds, self._on_image = engine, limit, seconds, on_image
        self._most = most
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._there_is_one = asyncio.Event()
        self._mean_seconds = SECONDS_UNKNOWN

    def __len__(self) -> int:
        """Return how many jobs wait."""
        return len(self._waiting)

    @property
    def current(self) -> Job | None:
        """Return the job under way, the first one of a batch; None for none."""
        return self._running[0] if self._running else None

    @property
    def waiting(self) -> tuple[Job, ...]:
        """Return the jobs that wait, the next one first."""
        return tuple(self._waiting)

    def check_room(self) -> None:
        """Check that one more job would be accepted.

        Raises:
            QueueFull: when as many wait as may.
        """
        limit = self._limit if self._running else max(1, self._limit)  # what is to begin at once does not wait
        if len(self._waiting) >= limit:
            raise QueueFull(self.seconds_ahead())

    def submit(self, job: Job) -> Job:
        """Accept a job; it gets its time limit.

        Raises:
            QueueFull: when as many wait as may.
        """
        self.check_room()
        job.accepted = time.monotonic()
        self._waiting.append(job)
        self._there_is_one.set()
        job.timer = asyncio.get_running_loop().call_later(
            self._seconds, self.end, job, "late", f"not done within {self._seconds:g} s; the server's limit"
        )
        return job

    def seconds_ahead(self) -> float:
        """Return how long the jobs that are here will probably take."""
        jobs = (*self._waiting, *self._running)
        return sum(len(job.requests) - len(job.images) for job in jobs) * self._mean_seconds

    def end(self, job: Job, stage: Stage, problem: str) -> None:
        """End a job that is not over: one that waits at once, the one under way between two steps.

        A job whose image is made together with another's gets no image, and that goes on.
        """
        if job.is_over:
            return
        if job not in self._running:
            if job in self._waiting:
                self._waiting.remove(job)
            job.end(stage, problem)
        elif job.wanted_end is None:
            job.wanted_end, job.problem = stage, problem
            if all(one.is_over or one.wanted_end is not None for one in self._running):
                self._engine.cancel()
            else:
                job.end(stage, problem)

    def end_all(self, problem: str) -> None:
        """End every job that is not over, as "unserved"."""
        for job in (*self._waiting, *self._running):
            self.end(job, "unserved", problem)

    async def wait_until_empty(self) -> None:
        """Wait until no job waits or is under way."""
        while self._running or self._waiting:
            job = (*self._running, *self._waiting)[0]
            await job.wait()
            await asyncio.sleep(0)

    async def run(self) -> None:
        """Have one job after the other done, until the task is cancelled."""
        while True:
            await self._there_is_one.wait()
            if not self._waiting:
                self._there_is_one.clear()
                continue
            try:
                await self._engine.wait_until_ready()
            except EngineFailure as error:
                self.end_all(str(error))
                await asyncio.sleep(0.1)
                continue
            if self._waiting:
                self._running = self._take()
                try:
                    await self._do(self._running)
                finally:
                    for job in self._running:
                        _log(job)
                    self._running = []

    def _take(self) -> list[Job]:
        """Take the next job out of the queue, and those of one image that go with it."""
        first = self._waiting.popleft()
        if len(first.requests) > 1:
            return [first]
        single = [job for job in self._waiting if len(job.requests) == 1]
        alike = [job for job in single if job.requests[0].goes_with(first.requests[0])][: self._at_once - 1]
        for job in alike:
            self._waiting.remove(job)
        return [first, *alike]

    @property
    def _at_once(self) -> int:
        """Return how many images one call of the pipeline makes at most."""
        facts = self._engine.facts
        return self._most if facts is not None and facts.takes_batches else 1

    async def _do(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.stage, job.begun = "drawing", time.monotonic()
            job.notify()
        try:
            if len(jobs) > 1:
                await self._draw([job.requests[0] for job in jobs], jobs)
            else:
                job, at_once = jobs[0], self._at_once if jobs[0].requests[0].image is None else 1
                for start in range(0, len(job.requests), at_once):
                    requests = job.requests[start : start + at_once]
                    await self._draw(requests, [job] * len(requests))
        except Cancelled as error:
            for job in jobs:
                problem = " ".join(filter(None, [job.problem or "cancelled", str(error)]))
                job.end(job.wanted_end or "cancelled", problem)
        except Refused as error:
            _end_all(jobs, "refused", str(error))
        except EngineFailure as error:
            _end_all(jobs, "failed", str(error))
        except Exception as error:
            logger.exception("a fault of the server", extra={"request": jobs[0].id})
            _end_all(jobs, "failed", f"a fault of the server: {type(error).__name__}")
        else:
            _end_all(jobs, "done")

    async def _draw(self, requests: Sequence[ImageRequest], owners: Sequence[Job]) -> None:
        """Have images made in one call, and give each to its job."""
        if all(job.wanted_end is not None for job in owners):
            raise Cancelled

        def on_step(step: StepDone) -> None:
            for job in owners:
                job.progress = step
                job.preview = step if step.preview is not None else job.preview
                job.notify()

        for job in owners:
            job.progress = job.preview = None
        for job, image in zip(owners, await self._engine.draw(requests, on_step), strict=True):
            job.images.append(image)
            self._mean_seconds += 0.3 * (image.seconds - self._mean_seconds)
            self._on_image(image)
            job.notify()


def _end_all(jobs: Sequence[Job], stage: Stage, problem: str = "") -> None:
    for job in jobs:
        job.end(stage, problem)


def _log(job: Job) -> None:
    """Log how a job that had its turn has ended."""
    details = {
        "request": job.id,
        "stage": job.stage,
        "images": len(job.images),
        "waited": round(job.begun - job.accepted, 3),
        "seconds": round(time.monotonic() - job.begun, 3),
        "sent_bytes": sum(image.sent_bytes for image in job.images),
    }
    logger.info("images", extra={**details, **({"problem": job.problem} if job.problem else {})})
