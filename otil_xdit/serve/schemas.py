"""The bodies of OpenAI's images API, with this server's further fields."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_PROMPT = 32_000
"""Characters, as OpenAI has it; text encoders take fewer tokens, and diffusers cuts the rest off with a warning."""

MAX_SEED = 2**63 - 1

SIZE = r"^(auto|[1-9][0-9]{1,4}x[1-9][0-9]{1,4})$"

PATTERNS: dict[str | None, str] = {"size": "give WIDTHxHEIGHT, from 10 to 99999 pixels each, or auto"}
"""What the patterns of fields mean, for people."""

IGNORED = {
    "user": "for statistics of OpenAI's own",
    "quality": "a model here has one quality; steps are num_inference_steps",
    "style": "of dall-e-3",
    "moderation": "there is none",
    "background": "images here have no transparency",
    "input_fidelity": "of gpt-image-1",
}
"""Fields that OpenAI's clients may send and that change nothing."""

Name = Annotated[str, Field(min_length=1, max_length=200)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class LoraField(BaseModel):
    """A LoRA of the server's folder."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    weight: Annotated[Finite, Field(ge=-10, le=10)] = 1.0


LoraValue = str | LoraField | list[LoraField | str] | None
"""A name, "name:weight", {name, weight}, or a list of them."""


class LoraBody(BaseModel):
    """LoRAs alone, as a form's field may hold them in JSON."""

    lora: LoraValue = None

    def named(self) -> list[tuple[str, float]]:
        """Return names and weights."""
        given = [] if self.lora is None else self.lora if isinstance(self.lora, list) else [self.lora]
        return [_named(one) if isinstance(one, str) else (one.name, one.weight) for one in given]


class ImageFields(BaseModel):
    """What generations and edits have in common."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT, description="What the image is to show.")]
    model: Annotated[str | None, Field(description="The served model's name; it may be left out.")] = None
    n: Annotated[int | None, Field(ge=1, le=1000, description="Images; the second one has the next seed.")] = 1
    size: Annotated[str | None, Field(pattern=SIZE, description="WIDTHxHEIGHT, or auto for the model's own.")] = "auto"
    response_format: Annotated[Literal["b64_json", "url"] | None, Field(description="Where the image stands.")] = None
    output_format: Annotated[Literal["png", "jpeg", "webp"] | None, Field(description="The file's format.")] = "png"
    output_compression: Annotated[
        int | None, Field(ge=0, le=100, description="Quality of JPEG and WebP, 100 for the best.")
    ] = None
    seed: Annotated[
        int | None, Field(ge=0, le=MAX_SEED, description="Of the noise; a random one, which is answered, without it.")
    ] = None
    negative_prompt: Annotated[str | None, Field(max_length=MAX_PROMPT, description="What it is not to show.")] = None
    num_inference_steps: Annotated[int | None, Field(ge=1, le=10_000, description="Denoising steps.")] = None
    guidance_scale: Annotated[Finite | None, Field(ge=0, le=1000, description="Weight of the prompt.")] = None
    scheduler: Annotated[Name | None, Field(description="A sampler; the model's own without it.")] = None
    lora: Annotated[
        LoraValue,
        Field(description="LoRA of the server's folder: a name, name:weight, {name, weight}, or a list of them."),
    ] = None
    stream: Annotated[bool | None, Field(description="Answer with server-sent events, step by step.")] = False
    partial_images: Annotated[int | None, Field(ge=0, le=10, description="Previews of a streamed image.")] = 0
    user: Any = None
    quality: Any = None
    style: Any = None
    moderation: Any = None
    background: Any = None
    input_fidelity: Any = None

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _is_text(cls, text: str | None) -> str | None:
        if text is not None and ("\0" in text or any(0xD800 <= ord(letter) <= 0xDFFF for letter in text)):
            raise ValueError("has characters that are no text")
        return text

    def loras(self) -> list[tuple[str, float]]:
        """Return names and weights of the LoRAs that are asked for."""
        return LoraBody(lora=self.lora).named()


class GenerationBody(ImageFields):
    """A body of ``POST /v1/images/generations``."""


class EditBody(ImageFields):
    """The fields of ``POST /v1/images/edits`` besides the files."""

    strength: Annotated[
        Finite | None, Field(ge=0, le=1, description="How much of the image is given up; 1 for all of it.")
    ] = None


class ImageData(BaseModel):
    """One image of an answer."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImagesAnswer(BaseModel):
    """The answer of both routes."""

    created: int
    data: list[ImageData]
    output_format: str
    size: str
    model: str
    seconds: float


class ModelCard(BaseModel):
    """One model of ``GET /v1/models``."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The answer of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorFields(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Every answer other than 2xx."""

    error: ErrorFields
    detail: str


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "a field is wrong; it is named",
        401: "the key is wrong",
        404: "no such model",
        413: "too many bytes or pixels",
        422: "the model cannot make this image",
        429: "the queue is full",
        499: "cancelled",
        500: "the ranks were lost",
        503: "no image can be made now",
        504: "over the time limit",
    }.items()
}
"""Answers other than 200, for the descriptions of routes."""


def _named(text: str) -> tuple[str, float]:
    """Return name and weight of "name" or "name:0.8"."""
    found = re.fullmatch(r"(.+):(-?\d{1,2}(?:\.\d{1,6})?)", text)
    return (found[1], float(found[2])) if found else (text, 1.0)
