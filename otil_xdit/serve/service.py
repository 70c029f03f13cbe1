"""`Service`: what all APIs of the server share: engine, queue, limits, files. An API turns its fields into `Wish`es."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from fastapi import Request
from PIL import Image

from otil_xdit.serve import images
from otil_xdit.serve.engine import Engine
from otil_xdit.serve.files import Files
from otil_xdit.serve.job import Job
from otil_xdit.serve.jobs import Jobs, QueueFull
from otil_xdit.serve.loras import LoraListing
from otil_xdit.serve.metrics import Metrics
from otil_xdit.serve.problems import Problem, problem_of
from otil_xdit.serve.requests import ImageRequest, ModelFacts
from otil_xdit.serve.settings import ServeSettings

SEED_LIMIT = 2**31
"""Random seeds are below it, so that every client can hold them."""


@dataclass(frozen=True)
class FieldNames:
    """What an API calls the fields that messages name."""

    size: str = "size"
    steps: str = "num_inference_steps"
    scheduler: str = "scheduler"
    lora: str = "lora"
    image: str = "image"
    mask: str = "mask"
    n: str = "n"


@dataclass(frozen=True)
class Wish:
    """Images of one request, as an API has read them; what is None is the model's own.

    Attributes:
        n: images; their seeds count up from `seed`.
        loras: names and weights.
        image, mask: decoded (`otil_xdit.serve.images.decode`).
        previews: of each image.
    """

    prompt: str
    negative_prompt: str | None = None
    n: int = 1
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    loras: Sequence[tuple[str, float]] = ()
    image: Image.Image | None = None
    mask: Image.Image | None = None
    strength: float | None = None
    previews: int = 0


class Service:
    """The server behind its APIs.

    Attributes:
        engine, settings, jobs, files, loras, metrics: see there.
        is_draining: whether no more requests are accepted.
    """

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine)
        limits = (settings.max_queue, settings.request_timeout)
        self.jobs = Jobs(engine, *limits, self.metrics.count, settings.max_batch)
        self.metrics.follow(self.jobs)
        self.files, self.loras = Files(), LoraListing(settings.lora_dir)
        self.is_draining = False

    def ready_facts(self) -> ModelFacts:
        """Return what is known of the model.

        Raises:
            Problem: 503 while no image can be made.
        """
        status, facts = self.engine.status, self.engine.facts
        if self.is_draining:
            raise Problem(503, "the server is shutting down", code="shutting_down", retry_after=10)
        if status.state != "ready" or facts is None:
            reason = f": {status.reason}" if status.reason else ""
            wait = None if status.state == "failed" else 5.0
            raise Problem(503, f"the model is not ready ({status.state}{reason})", code=status.state, retry_after=wait)
        return facts

    def check_room(self) -> None:
        """Refuse a request that would not be accepted, before its images are decoded, which takes memory.

        Raises:
            Problem: 429, 503.
        """
        self.ready_facts()
        try:
            self.jobs.check_room()
        except QueueFull as error:
            raise self._full(error) from error

    def submit(self, wish: Wish, request_id: str, names: FieldNames) -> Job:
        """Check a wish and put it into the queue.

        Raises:
            Problem: 400 naming the field, 429 with the time to wait, 503.
        """
        facts = self.ready_facts()
        job = Job(tuple(self._requests_of(wish, facts, names)), request_id)
        try:
            return self.jobs.submit(job)
        except QueueFull as error:
            raise self._full(error) from error

    def _full(self, error: QueueFull) -> Problem:
        text = f"{len(self.jobs)} requests wait, which is the server's limit; try again later"
        return Problem(429, text, code="queue_full", retry_after=error.retry_after)

    async def finish(self, job: Job, request: Request) -> None:
        """Wait until a job is over; its images are cancelled when the client goes away.

        Raises:
            Problem: for a job without all images.
        """
        gone = asyncio.create_task(wait_until_gone(request))
        waiting = asyncio.create_task(job.wait())
        try:
            await asyncio.wait({gone, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                self.jobs.end(job, "cancelled", "the client is gone")
                await waiting
        finally:
            for task in (gone, waiting):
                task.cancel()
            self.jobs.end(job, "cancelled", "the client is gone")
            with suppress(asyncio.CancelledError):
                await gone
        problem = problem_of(job)
        if problem is not None:
            raise problem

    # ---- from wishes to requests -----------------------------------------------------------------------------------

    def _requests_of(self, wish: Wish, facts: ModelFacts, names: FieldNames) -> list[ImageRequest]:
        limits = self.settings
        width, height = self._size_of(wish, facts, names)
        if wish.steps is not None and wish.steps > limits.max_steps:
            raise _too_many(names.steps, wish.steps, limits.max_steps, "steps")
        if wish.n > limits.max_images:
            raise _too_many(names.n, wish.n, limits.max_images, "images")
        if wish.scheduler is not None and wish.scheduler not in facts.schedulers:
            known = f"choose from {', '.join(facts.schedulers)}" if facts.schedulers else "this model keeps its own"
            raise Problem(
                400,
                f"{names.scheduler} {wish.scheduler[:100]!r} is not known; {known}",
                names.scheduler,
                "unknown_value",
            )
        if wish.loras and not facts.takes_lora:
            raise Problem(400, f"{names.lora}: this model takes none", names.lora, "unknown_lora")
        loras = self.loras.choose(wish.loras, names.lora)
        image, mask = wish.image, wish.mask
        if image is not None and ("image" if mask is None else "inpaint") not in facts.edits:
            raise Problem(422, f"{facts.model} does not make images from images", names.image, "unsupported")
        seed = secrets.randbelow(SEED_LIMIT) if wish.seed is None else wish.seed
        first = ImageRequest(
            prompt=wish.prompt,
            seed=seed,
            negative_prompt=wish.negative_prompt,
            width=width,
            height=height,
            steps=wish.steps,
            guidance_scale=wish.guidance_scale,
            scheduler=wish.scheduler,
            loras=loras,
            image=None if image is None else images.fitted(image, width or 0, height or 0),
            mask=None if mask is None else images.mask_of(mask, width or 0, height or 0),
            strength=wish.strength,
            previews=wish.previews,
        )
        return [replace(first, seed=(seed + number) % 2**63) for number in range(wish.n)]

    def _size_of(self, wish: Wish, facts: ModelFacts, names: FieldNames) -> tuple[int | None, int | None]:
        """Return the size of the images: the one asked for, that of the image to start from, or the model's own."""
        width, height = wish.width, wish.height
        if wish.image is not None and width is None and height is None:
            width, height = (side - side % 8 for side in wish.image.size)
        width, height = width or facts.width, height or facts.height
        for side in (width, height):
            if side is not None and (side % 8 or side < 8):
                shown = f"{width}x{height}"
                raise Problem(400, f"{names.size} is {shown}; give multiples of 8", names.size, "invalid_size")
        if width is not None and height is not None and width * height > self.settings.max_pixels:
            raise _too_many(names.size, f"{width}x{height}", self.settings.max_pixels, "pixels")
        return width, height


async def wait_until_gone(request: Request) -> None:
    """Wait until the client has closed the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_many(field: str, value: object, limit: int, what: str) -> Problem:
    return Problem(400, f"{field} is {value}; this server makes at most {limit} {what}", field, "over_limit")
