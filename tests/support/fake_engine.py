"""An engine without ranks: images of one colour, at once or when told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from otil_xdit.serve.engine import Cancelled, EngineFailure, EngineStatus
from otil_xdit.serve.requests import DrawnImage, ImageRequest, ModelFacts, Pixels, StepDone

FACTS = ModelFacts(
    model="tiny-sdxl",
    pipeline="StableDiffusionXLPipeline",
    parallel="128 x 128 pixels, strategy otil, 2 ranks (2 patches) on the CPU",
    ranks=2,
    width=128,
    height=128,
    steps=4,
    guidance_scale=5.0,
    edits=("image", "inpaint"),
    schedulers=("ddim", "euler"),
    scheduler="DDIMScheduler",
    takes_lora=True,
    takes_batches=True,
)


class FakeEngine:
    """An engine whose images show their seed as a colour.

    Attributes:
        asked, calls: all requests that came; the same by call.
        gate: images wait for it before their last step.
        fault: what the next image raises, once.
    """

    def __init__(self, status: EngineStatus | None = None) -> None:
        self.status = status or EngineStatus("ready")
        self.facts: ModelFacts | None = FACTS
        self.asked: list[ImageRequest] = []
        self.calls: list[list[ImageRequest]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.cancels = 0
        self._is_cancelled = False

    async def start(self) -> None:
        pass

    async def wait_until_ready(self) -> None:
        while self.status.state in ("loading", "restarting"):
            await asyncio.sleep(0.01)
        if self.status.state != "ready":
            raise EngineFailure(self.status.reason)

    async def draw(self, requests: Sequence[ImageRequest], on_step: Callable[[StepDone], None]) -> list[DrawnImage]:
        self.asked += requests
        self.calls.append(list(requests))
        self._is_cancelled = False
        return [await self._draw_one(request, on_step) for request in requests]

    def cancel(self) -> None:
        self.cancels += 1
        self._is_cancelled = True

    async def stop(self) -> None:
        self.status = replace(self.status, state="stopped")

    async def _draw_one(self, request: ImageRequest, on_step: Callable[[StepDone], None]) -> DrawnImage:
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        steps = request.steps or FACTS.steps or 1
        for step in range(1, steps + 1):
            while not self.gate.is_set() and step == steps and not self._is_cancelled:
                await asyncio.sleep(0.005)
            if self._is_cancelled:
                raise Cancelled(f"after step {step} of {steps}")
            shown = step if request.previews and step < steps else 0
            on_step(StepDone(step, steps, colour(shown, 8, 8) if shown else None))
            await asyncio.sleep(0)
        return DrawnImage(colour(request.seed, request.width or 128, request.height or 128), 0.01, 100, 0.001)


def colour(seed: int, width: int, height: int) -> Pixels:
    """An image of the seed's colour."""
    return Pixels(width, height, "RGB", bytes([seed % 256, seed // 256 % 256, 7]) * (width * height))
