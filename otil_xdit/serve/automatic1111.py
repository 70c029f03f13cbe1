"""AUTOMATIC1111's API, for the many user interfaces that know it: ``/sdapi/v1/txt2img`` and what goes with it.

Fields that have no meaning here are ignored, as there; fields that would make another image are refused by name.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field

from otil_xdit.serve import images
from otil_xdit.serve.job import Job
from otil_xdit.serve.middleware import request_id
from otil_xdit.serve.problems import Problem
from otil_xdit.serve.schemas import ERRORS, MAX_PROMPT, MAX_SEED, Finite
from otil_xdit.serve.service import FieldNames, Service, Wish

NAMES = FieldNames("width", "steps", "sampler_name", "prompt", "init_images", "mask", "n_iter")

PREVIEWS = 4
"""Of an image, for ``/progress``."""

SAMPLERS = {
    "Euler": "euler",
    "Euler a": "euler-a",
    "Heun": "heun",
    "DPM2": "kdpm2",
    "DPM2 a": "kdpm2-a",
    "DPM++ 2M": "dpm-solver",
    "DPM++ 2M SDE": "dpm-solver-sde",
    "DDIM": "ddim",
    "DDPM": "ddpm",
    "DEIS": "deis",
    "PLMS": "pndm",
    "LCM": "lcm",
    "TCD": "tcd",
    "UniPC": "unipc",
}
"""Its samplers, and what they are called here."""

MODELS_OWN = (None, "", "Automatic", "automatic", "Default")
"""Names of samplers and schedules that leave it to the model."""

REFUSED = (
    *("enable_hr", "restore_faces", "tiling", "styles", "script_name", "alwayson_scripts", "subseed_strength"),
    *("refiner_checkpoint", "inpaint_full_res", "include_init_images", "firstphase_width", "s_churn"),
)
"""Fields that would make another image, where they are more than off; ``inpaint_full_res`` is "only masked"."""

_LORA = re.compile(r"<lora:([^:<>]{1,200})(?::(-?\d{1,2}(?:\.\d{1,6})?))?>")


class TextBody(BaseModel):
    """What is read of a body of ``txt2img``; what is not given is the model's own."""

    model_config = ConfigDict(extra="allow")

    prompt: Annotated[str, Field(max_length=MAX_PROMPT)] = ""
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT)] = ""
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] = -1
    steps: Annotated[int | None, Field(ge=1, le=10_000)] = None
    cfg_scale: Annotated[Finite | None, Field(ge=0, le=1000)] = None
    width: Annotated[int | None, Field(ge=8, le=65536)] = None
    height: Annotated[int | None, Field(ge=8, le=65536)] = None
    sampler_name: Annotated[str | None, Field(max_length=100)] = None
    sampler_index: Annotated[str | None, Field(max_length=100)] = None
    scheduler: Annotated[str | None, Field(max_length=100)] = None
    batch_size: Annotated[int, Field(ge=1, le=1000)] = 1
    n_iter: Annotated[int, Field(ge=1, le=1000)] = 1
    send_images: bool = True
    override_settings: dict[str, Any] | None = None


class ImageBody(TextBody):
    """What is read of a body of ``img2img``."""

    init_images: Annotated[list[str], Field(min_length=1, max_length=1)]
    mask: str | None = None
    inpainting_mask_invert: Annotated[int, Field(ge=0, le=1)] = 0
    denoising_strength: Annotated[Finite, Field(ge=0, le=1)] = 0.75


class Answer(BaseModel):
    """The answer of both: images in base64, the fields that were read, and a JSON text on what was made."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


def automatic1111_router(service: Service) -> APIRouter:
    """Return the routes."""
    known: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (400, 401)}
    router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"], responses=known)

    @router.post("/txt2img", responses=ERRORS)
    async def txt2img(body: TextBody, request: Request) -> Answer:
        """Make images from a text."""
        return await _answer(service, body, _wish(body), request)

    @router.post("/img2img", responses=ERRORS)
    async def img2img(body: ImageBody, request: Request) -> Answer:
        """Make images from an image and a text; with a mask only where that is white."""
        service.check_room()
        wish = _wish(body, strength=body.denoising_strength, **await asyncio.to_thread(_sources, service, body))
        return await _answer(service, body, wish, request)

    @router.get("/progress")
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        """Tell how far the image under way is."""
        return _progress(service, service.jobs.current, skip_current_image)

    @router.post("/interrupt")
    @router.post("/skip")
    async def interrupt() -> dict[str, Any]:
        """End the image under way between two steps; its request is answered with the images before it."""
        if service.jobs.current is not None:
            service.jobs.end(service.jobs.current, "cancelled", "interrupted")
        return {}

    _add_lists(router, service)
    return router


def _add_lists(router: APIRouter, service: Service) -> None:
    """Add what user interfaces ask for before they show anything."""
    name = service.settings.name

    @router.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        """List the one model."""
        return [{"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}]

    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """List the samplers of this model."""
        known = service.engine.facts.schedulers if service.engine.facts is not None else ()
        return [{"name": one, "aliases": [ours], "options": {}} for one, ours in SAMPLERS.items() if ours in known]

    @router.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """List the noise schedules: the model's own."""
        return [{"name": "automatic", "label": "Automatic"}]

    @router.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        """List what a prompt may name as ``<lora:NAME:WEIGHT>``."""
        return [{"name": one, "alias": one, "path": one, "metadata": {}} for one in service.loras.names()]

    @router.get("/options")
    async def options() -> dict[str, Any]:
        """Tell the settings that there are."""
        return {"sd_model_checkpoint": name, "samples_format": "png", "CLIP_stop_at_last_layers": 1}

    @router.post("/options", responses={422: ERRORS[422]})
    async def set_options(options: dict[str, Any]) -> None:
        """Take settings that change nothing; another model is refused."""
        _check_model(service, options.get("sd_model_checkpoint"))

    for path in ("upscalers", "sd-vae", "hypernetworks", "face-restorers", "prompt-styles", "realesrgan-models"):
        router.get(f"/{path}", summary="An empty list: there are none.")(_nothing)

    @router.get("/embeddings")
    async def embeddings() -> dict[str, Any]:
        """Tell that there are none."""
        return {"loaded": {}, "skipped": {}}


async def _nothing() -> list[Any]:
    return []


def _check_model(service: Service, model: Any) -> None:
    if model not in (None, "", service.settings.name):
        text = f"the model here is {service.settings.name}, and cannot be changed"
        raise Problem(422, text, "sd_model_checkpoint", "model_not_found")


def _wish(body: TextBody, **more: Any) -> Wish:
    given = body.model_extra or {}
    refused = [name for name in REFUSED if given.get(name)]
    if refused:
        raise Problem(422, f"{refused[0]} is not supported here; leave it out", refused[0], "unsupported")
    if body.scheduler not in MODELS_OWN:
        raise Problem(422, f"scheduler {body.scheduler!r}: give Automatic", "scheduler", "unsupported")
    loras = [(name, float(weight or 1)) for name, weight in _LORA.findall(body.prompt)]
    sampler = body.sampler_name or body.sampler_index
    return Wish(
        prompt=_LORA.sub("", body.prompt).strip(),
        negative_prompt=body.negative_prompt or None,
        n=body.batch_size * body.n_iter,
        seed=None if body.seed < 0 else body.seed,
        width=body.width,
        height=body.height,
        steps=body.steps,
        guidance_scale=body.cfg_scale,
        scheduler=None if sampler in MODELS_OWN else SAMPLERS.get(str(sampler), sampler),
        loras=loras,
        previews=PREVIEWS,
        **more,
    )


def _sources(service: Service, body: ImageBody) -> dict[str, Image.Image]:
    """Return the images of a body, decoded."""
    limit = service.settings.max_pixels
    found = {"image": images.decode(_bytes(body.init_images[0], "init_images"), "init_images", limit)}
    if body.mask:
        mask = images.decode(_bytes(body.mask, "mask"), "mask", limit).convert("L")
        found["mask"] = ImageOps.invert(mask) if body.inpainting_mask_invert else mask
    return found


def _bytes(text: str, field: str) -> bytes:
    """Return what base64 stands for, with or without the head of a data URL; addresses are never fetched."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Problem(400, f"{field} is not base64 of an image", field, "invalid_image") from error


async def _answer(service: Service, body: TextBody, wish: Wish, request: Request) -> Answer:
    _check_model(service, (body.override_settings or {}).get("sd_model_checkpoint"))
    job = service.submit(wish, request_id(request), NAMES)
    try:
        await service.finish(job, request)
    except Problem:
        if job.stage != "cancelled":
            raise
    coded = [await asyncio.to_thread(images.encode, image.pixels) for image in job.images]
    seeds = [one.seed for one in job.requests]
    first = job.requests[0]
    info = {
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt,
        "seed": seeds[0],
        "all_seeds": seeds,
        "width": first.width,
        "height": first.height,
        "steps": first.steps,
        "cfg_scale": first.guidance_scale,
        "sampler_name": body.sampler_name,
        "sd_model_name": service.settings.name,
        "interrupted": job.stage == "cancelled",
    }
    shown = [base64.b64encode(one).decode() for one in coded] if body.send_images else []
    # What was ignored is not sent back: it may be megabytes, or no text at all.
    parameters = body.model_dump(include=set(type(body).model_fields) - {"init_images", "mask", "override_settings"})
    return Answer(images=shown, parameters=parameters, info=json.dumps(info))


def _progress(service: Service, job: Job | None, without_image: bool) -> dict[str, Any]:
    step = job.progress.step if job is not None and job.progress is not None else 0
    steps = job.progress.steps if job is not None and job.progress is not None else 0
    done, count = (len(job.images), len(job.requests)) if job is not None else (0, 0)
    share = (done + (step / steps if steps else 0.0)) / count if count else 0.0
    seconds = time.monotonic() - job.begun if job is not None and job.begun else 0.0
    preview = job.preview.preview if job is not None and job.preview is not None else None
    current = None if preview is None or without_image else base64.b64encode(images.encode(preview)).decode()
    return {
        "progress": round(share, 4),
        "eta_relative": round(seconds / share - seconds, 2) if share else 0.0,
        "state": {
            "skipped": False,
            "interrupted": job is not None and job.wanted_end is not None,
            "job": "" if job is None else job.id,
            "job_count": len(service.jobs) + (job is not None),
            "job_no": done,
            "sampling_step": step,
            "sampling_steps": steps,
        },
        "current_image": current,
        "textinfo": None,
    }
