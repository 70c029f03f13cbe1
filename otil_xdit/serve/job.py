"""`Job`: one request's images, from the moment it is accepted to its end."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from otil_xdit.serve.requests import DrawnImage, ImageRequest, StepDone

Stage = Literal["waiting", "drawing", "done", "refused", "cancelled", "failed", "late", "unserved"]
"""Of a job; the last five are ends without all images: see `Job.problem`. "late": over the time limit; "unserved": the
server gave up before it was its turn."""


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
        wanted_end: how it shall end, once the image under way does; None while it shall not.
        timer: of its time limit.
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
    wanted_end: Stage | None = None
    timer: asyncio.TimerHandle | None = None

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
            if self.timer is not None:  # which would keep the images
                self.timer.cancel()
            self.notify()
