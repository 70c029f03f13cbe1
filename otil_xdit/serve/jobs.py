"""`Jobs`: the bounded queue of requests, and the one task that has their images made in turn."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal

from otil_xdit.serve.engine import Cancelled, Engine, EngineFailure, Refused
from otil_xdit.serve.requests import DrawnImage, ImageRequest, StepDone

logger = logging.getLogger(__name__)

Stage = Literal["waiting", "drawing", "done", "refused", "cancelled", "failed", "late", "unserved"]
"""Of a job; the last five are ends without all images: see `Job.problem`. "late": over the time limit; "unserved": the
server gave up before it was its turn."""

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


@dataclass(eq=False)
class Job:
    """A request of one or more images.

    Attributes:
        requests: its images, made in this order.
        id: the request's, for logs and answers.
        stage: see `Stage`.
        problem: why it ended without all images; empty otherwise.
        images: those that are done.
        progress: of the image under way; None before its first step.
        preview: the last one of the image under way.
        accepted, begun: when, by ``time.monotonic``; 0 for not yet.
    """

    requests: tuple[ImageRequest, ...]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    stage: Stage = "waiting"
    problem: str = ""
    images: list[DrawnImage] = field(default_factory=list)
    progress: StepDone | None = None
    preview: StepDone | None = None
    accepted: float = 0.0
    begun: float = 0.0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _wanted_end: Stage | None = None
    _timer: asyncio.TimerHandle | None = None

    @property
    def is_over(self) -> bool:
        """Return whether nothing more will happen to it."""
        return self.stage not in ("waiting", "drawing")

    def notify(self) -> None:
        """Wake everybody who follows it."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait(self) -> None:
        """Wait for its end."""
        while not self.is_over:
            await self._changed.wait()

    async def follow(self) -> AsyncIterator[StepDone | DrawnImage]:
        """Yield its steps and images as they come, until its end; steps may be left out, previews and images not."""
        shown, seen, previewed = 0, None, None
        while True:
            changed = self._changed
            if self.preview is not None and self.preview is not previewed:
                previewed = seen = self.preview
                yield self.preview
            elif self.progress is not None and self.progress is not seen:
                seen = self.progress
                yield self.progress
            for image in self.images[shown:]:
                shown += 1
                yield image
            if self.is_over and shown == len(self.images):
                return
            await changed.wait()

    def end(self, stage: Stage, problem: str = "") -> None:
        """End it, once."""
        if not self.is_over:
            self.stage, self.problem = stage, problem
            if self._timer is not None:  # which would keep the images
                self._timer.cancel()
            self.notify()


class Jobs:
    """The queue, and the task that empties it.

    Args:
        engine: makes the images.
        limit: jobs that may wait.
        seconds: that a job may take, waiting included.
        on_image: called with each image that is done.
    """

    def __init__(
        self, engine: Engine, limit: int, seconds: float, on_image: Callable[[DrawnImage], None] = lambda image: None
    ) -> None:
        self._engine, self._limit, self._seconds, self._on_image = engine, limit, seconds, on_image
        self._waiting: deque[Job] = deque()
        self._there_is_one = asyncio.Event()
        self._mean_seconds = SECONDS_UNKNOWN
        self.current: Job | None = None
        self.is_closed = False

    def __len__(self) -> int:
        """Return how many jobs wait."""
        return len(self._waiting)

    @property
    def waiting(self) -> tuple[Job, ...]:
        """Return the jobs that wait, the next one first."""
        return tuple(self._waiting)

    def submit(self, job: Job) -> Job:
        """Accept a job; it gets its time limit.

        Raises:
            QueueFull: when as many wait as may.
        """
        if len(self._waiting) >= self._limit and (self._limit > 0 or self.current is not None):
            raise QueueFull(self.seconds_ahead())
        job.accepted = time.monotonic()
        self._waiting.append(job)
        self._there_is_one.set()
        job._timer = asyncio.get_running_loop().call_later(
            self._seconds, self.end, job, "late", f"not done within {self._seconds:g} s; the server's limit"
        )
        return job

    def seconds_ahead(self) -> float:
        """Return how long the jobs that are here will probably take."""
        jobs = [*self._waiting, *([self.current] if self.current is not None else [])]
        return sum(len(job.requests) - len(job.images) for job in jobs) * self._mean_seconds

    def end(self, job: Job, stage: Stage, problem: str) -> None:
        """End a job that is not over: one that waits at once, the one under way between two steps."""
        if job.is_over:
            return
        if job is self.current:
            if job._wanted_end is None:
                job._wanted_end, job.problem = stage, problem
                self._engine.cancel()
            return
        if job in self._waiting:
            self._waiting.remove(job)
        job.end(stage, problem)

    def end_all(self, problem: str) -> None:
        """End every job that is not over, as "unserved"."""
        for job in (*self._waiting, *([self.current] if self.current is not None else [])):
            self.end(job, "unserved", problem)

    async def wait_until_empty(self) -> None:
        """Wait until no job waits or is under way."""
        while self.current is not None or self._waiting:
            job = self.current or self._waiting[0]
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
                self.current = self._waiting.popleft()
                try:
                    await self._do(self.current)
                    _log(self.current)
                finally:
                    self.current = None

    async def _do(self, job: Job) -> None:
        job.stage, job.begun = "drawing", time.monotonic()
        job.notify()

        def on_step(step: StepDone) -> None:
            job.progress = step
            if step.preview is not None:
                job.preview = step
            job.notify()

        try:
            for request in job.requests:
                if job._wanted_end is not None:
                    raise Cancelled
                job.progress = job.preview = None
                for image in await self._engine.draw([request], on_step):
                    job.images.append(image)
                    self._mean_seconds += 0.3 * (image.seconds - self._mean_seconds)
                    self._on_image(image)
                    job.notify()
        except Cancelled as error:
            job.end(job._wanted_end or "cancelled", " ".join(filter(None, [job.problem or "cancelled", str(error)])))
        except Refused as error:
            job.end("refused", str(error))
        except EngineFailure as error:
            job.end("failed", str(error))
        except Exception as error:
            logger.exception("a fault of the server", extra={"request": job.id})
            job.end("failed", f"a fault of the server: {type(error).__name__}")
        else:
            job.end("done")


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
