"""OpenAI's images API: ``/v1/images/generations``, ``/v1/images/edits``, ``/v1/models``; files of ``url`` answers."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request, Response, UploadFile
from fastapi.responses import StreamingResponse
from PIL import Image
from pydantic import Field, ValidationError

from otil_xdit.serve import images
from otil_xdit.serve.job import Job
from otil_xdit.serve.middleware import request_id
from otil_xdit.serve.problems import Problem, problem_of
from otil_xdit.serve.requests import DrawnImage, Pixels, StepDone
from otil_xdit.serve.schemas import (
    ERRORS,
    PATTERNS,
    EditBody,
    GenerationBody,
    ImageData,
    ImageFields,
    ImagesAnswer,
    LoraBody,
    ModelCard,
    ModelList,
)
from otil_xdit.serve.service import FieldNames, Service, Wish, wait_until_gone

NAMES = FieldNames()


class EditForm(EditBody):
    """The form of ``POST /v1/images/edits``."""

    image: Annotated[list[UploadFile], Field(description="What to start from: a PNG, JPEG or WebP file.")] = []
    image_list: Annotated[list[UploadFile], Field(alias="image[]", description="The same; one file in all.")] = []
    mask: Annotated[UploadFile | None, Field(description="Transparent, or white, where to paint anew.")] = None
    lora: Annotated[str | None, Field(max_length=2000, description="A name, name:weight, or a JSON list of them.")] = (
        None
    )

    def loras(self) -> list[tuple[str, float]]:
        """Return names and weights of the LoRAs that are asked for.

        Raises:
            Problem: for text that begins like JSON, and is none of the forms of a JSON body.
        """
        if self.lora is None or self.lora[:1] not in ("[", "{"):
            return super().loras()
        try:
            return LoraBody.model_validate_json(f'{{"lora": {self.lora}}}').named()
        except ValidationError as error:
            raise invalid(error.errors()) from error


def openai_router(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    started = int(time.time())

    @router.get("/models", responses={401: ERRORS[401]})
    async def models() -> ModelList:
        """List the one model."""
        return ModelList(data=[ModelCard(id=service.settings.name, created=started, owned_by="otil-xdit")])

    @router.get("/models/{model:path}", responses={401: ERRORS[401], 404: ERRORS[404]})
    async def model(model: str) -> ModelCard:
        """Describe the one model."""
        _check_model(service, model)
        return ModelCard(id=service.settings.name, created=started, owned_by="otil-xdit")

    @router.post("/images/generations", responses=ERRORS, response_model=ImagesAnswer)
    async def generations(body: GenerationBody, request: Request) -> Any:
        """Make images from a text."""
        _check_model(service, body.model)
        return await _answer(service, body, _wish(body), request, "image_generation")

    @router.post("/images/edits", responses=ERRORS, response_model=ImagesAnswer)
    async def edits(form: Annotated[EditForm, Form()], request: Request) -> Any:
        """Make images from an image and a text; with a mask only there."""
        _check_model(service, form.model)
        service.check_room()
        given = [*form.image, *form.image_list]
        if len(given) != 1:
            raise Problem(400, f"image: {len(given)} files; give one", "image", "invalid_image")
        source = await _decoded(service, given[0], "image")
        painted = None if form.mask is None else await _decoded(service, form.mask, "mask")
        wish = _wish(form, image=source, mask=painted, strength=form.strength)
        return await _answer(service, form, wish, request, "image_edit")

    @router.get("/files/{name}", responses={404: ERRORS[404]}, response_class=Response)
    async def file(name: str) -> Response:
        """Return an image that was answered by its address."""
        found = service.files.get(name)
        if found is None:
            raise Problem(404, "no such file, or no more", code="file_not_found")
        return Response(found[0], media_type=found[1], headers={"X-Content-Type-Options": "nosniff"})

    return router


async def _decoded(service: Service, file: UploadFile, field: str) -> Image.Image:
    return await asyncio.to_thread(images.decode, await file.read(), field, service.settings.max_pixels)


def invalid(errors: Any) -> Problem:
    """Return the answer to fields that are wrong, by pydantic's list of what is wrong with them."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    field = place[0] if place else None
    value = first.get("input")
    shown = f" (given: {json.dumps(value)[:80]})" if isinstance(value, (str, int, float, bool)) else ""
    text = PATTERNS.get(field, first["msg"]) if first["type"] == "string_pattern_mismatch" else first["msg"]
    return Problem(400, f"{'.'.join(place) or 'the body'}: {text}{shown}", field, "invalid_value")


def _check_model(service: Service, model: str | None) -> None:
    if model not in (None, service.settings.name):
        shown = f"{str(model)[:100]!r} is not served here; the model is {service.settings.name!r}"
        raise Problem(404, shown, "model", "model_not_found")


def _wish(body: ImageFields, **more: Any) -> Wish:
    width = height = None
    if body.size is not None and body.size != "auto":
        width, height = map(int, body.size.split("x"))
    return Wish(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        n=body.n or 1,
        seed=body.seed,
        width=width,
        height=height,
        steps=body.num_inference_steps,
        guidance_scale=body.guidance_scale,
        scheduler=body.scheduler,
        loras=body.loras(),
        previews=body.partial_images or 0 if body.stream else 0,
        **more,
    )


async def _answer(service: Service, body: ImageFields, wish: Wish, request: Request, kind: str) -> Any:
    job = service.submit(wish, request_id(request), NAMES)
    if body.stream:
        events = _Events(service, body, job, request, kind)
        return StreamingResponse(events.text(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    await service.finish(job, request)
    answers = [
        await _data(service, body, image.pixels, asked.seed, request)
        for image, asked in zip(job.images, job.requests, strict=True)
    ]
    first = job.images[0].pixels
    return ImagesAnswer(
        created=int(time.time()),
        data=answers,
        output_format=body.output_format or "png",
        size=f"{first.width}x{first.height}",
        model=service.settings.name,
        seconds=round(sum(image.seconds for image in job.images), 3),
    )


async def _data(service: Service, body: ImageFields, pixels: Pixels, seed: int, request: Request) -> ImageData:
    kind = body.output_format or "png"
    data = await asyncio.to_thread(images.encode, pixels, kind, body.output_compression)
    if body.response_format == "url":
        name = service.files.add(data, f"image/{kind}")
        return ImageData(url=str(request.url_for("file", name=name)), seed=seed)
    return ImageData(b64_json=base64.b64encode(data).decode(), seed=seed)


class _Events:
    """The server-sent events of a job, by the names that OpenAI's clients know, and one for each step."""

    def __init__(self, service: Service, body: ImageFields, job: Job, request: Request, kind: str) -> None:
        self._service, self._body, self._job = service, body, job
        self._request, self._kind = request, kind
        self._shown, self._previews = 0, 0

    async def text(self) -> AsyncIterator[str]:
        """Yield the events; an error is the last one."""
        job = self._job
        gone = asyncio.create_task(wait_until_gone(self._request))
        gone.add_done_callback(lambda task: self._service.jobs.end(job, "cancelled", "the client is gone"))
        try:
            async for news in job.follow():
                values = await (self._step(news) if isinstance(news, StepDone) else self._image(news))
                yield _event(values["type"], values)
            problem = problem_of(job)
            if problem is not None:
                yield _event("error", problem.body(job.id))
            yield "data: [DONE]\n\n"
        finally:
            gone.cancel()

    async def _step(self, step: StepDone) -> dict[str, Any]:
        common = {"step": step.step, "steps": step.steps, "image_index": self._shown, "created_at": int(time.time())}
        if step.preview is None:
            return {"type": f"{self._kind}.progress", **common}
        data = await asyncio.to_thread(images.encode, step.preview, "png")
        self._previews += 1
        return {
            "type": f"{self._kind}.partial_image",
            "b64_json": base64.b64encode(data).decode(),
            "partial_image_index": self._previews - 1,
            **common,
            **self._look(step.preview, "png"),
        }

    async def _image(self, image: DrawnImage) -> dict[str, Any]:
        number, kind = self._shown, self._body.output_format or "png"
        self._shown, self._previews = number + 1, 0
        data = await _data(self._service, self._body, image.pixels, self._job.requests[number].seed, self._request)
        return {
            "type": f"{self._kind}.completed",
            "image_index": number,
            "created_at": int(time.time()),
            **self._look(image.pixels, kind),
            **data.model_dump(exclude_none=True),
        }

    def _look(self, pixels: Pixels, kind: str) -> dict[str, Any]:
        size = f"{pixels.width}x{pixels.height}"
        return {"size": size, "output_format": kind, "quality": "auto", "background": "opaque"}


def _event(name: str, values: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(values)}\n\n"
