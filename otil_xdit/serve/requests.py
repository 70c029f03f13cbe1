"""What is asked of the ranks, and what they give back: plain values, without torch, for both sides of the socket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Pixels:
    """An image as bytes.

    Attributes:
        width, height: in pixels.
        mode: Pillow's name of the channels: "RGB" or "L", one byte a channel.
        data: rows from the top, pixels from the left.
    """

    width: int
    height: int
    mode: str
    data: bytes = field(repr=False)


def pixels_to_wire(images: Sequence[Pixels]) -> tuple[dict[str, Any], list[bytes]]:
    """Return what JSON can hold of images, and their bytes."""
    sizes = [{"width": one.width, "height": one.height, "mode": one.mode} for one in images]
    return {"pixels": sizes}, [one.data for one in images]


def pixels_from_wire(values: Mapping[str, Any], blobs: Sequence[bytes]) -> list[Pixels]:
    """Return the images that `pixels_to_wire` wrote."""
    return [Pixels(**one, data=data) for one, data in zip(values.get("pixels", ()), blobs, strict=True)]


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA of one image.

    Attributes:
        name: as clients know it.
        path: of its file, from the server's own listing.
        weight: by which its change is multiplied.
    """

    name: str
    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class ImageRequest:
    """One image that is to be made.

    What is None is the model's own, or what the command line of the server gives.

    Attributes:
        prompt, negative_prompt: texts.
        seed: of the noise.
        width, height: in pixels.
        steps, guidance_scale: of the sampler.
        scheduler: a name of `otil_xdit.catalog.schedulers.SCHEDULERS`.
        loras: applied together.
        image: to start from, of the size asked for; None for text to image.
        mask: "L", white where the image is to be made anew; None for all of it.
        strength: how much of the image is given up, from 0 to 1.
        previews: small images of what is there by then, spread over the steps.
    """

    prompt: str
    seed: int
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    loras: tuple[LoraChoice, ...] = ()
    image: Pixels | None = None
    mask: Pixels | None = None
    strength: float | None = None
    previews: int = 0

    def to_wire(self) -> tuple[dict[str, Any], list[bytes]]:
        """Return what JSON can hold, and the images' bytes."""
        values, blobs = asdict(replace(self, image=None, mask=None)), []
        for name in ("image", "mask"):
            pixels: Pixels | None = getattr(self, name)
            if pixels is not None:
                values[name] = {"width": pixels.width, "height": pixels.height, "mode": pixels.mode}
                blobs.append(pixels.data)
        return values, blobs

    def goes_with(self, other: ImageRequest) -> bool:
        """Return whether both can be made in one call of the pipeline: only prompts and seeds differ."""
        if self.image is not None or other.image is not None:
            return False
        return self._without_prompt() == other._without_prompt()

    def _without_prompt(self) -> ImageRequest:
        negative = None if self.negative_prompt is None else ""
        return replace(self, prompt="", negative_prompt=negative, seed=0, previews=0)

    @classmethod
    def from_wire(cls, values: Mapping[str, Any], blobs: list[bytes]) -> ImageRequest:
        """Return the request that `to_wire` wrote; takes its images' bytes from the front of `blobs`."""
        images = {
            name: Pixels(**values[name], data=blobs.pop(0))
            for name in ("image", "mask")
            if values.get(name) is not None
        }
        loras = tuple(LoraChoice(**one) for one in values["loras"])
        return cls(**{**values, **images, "loras": loras})


@dataclass(frozen=True)
class StepDone:
    """A step of the image under way.

    Attributes:
        step: steps done.
        steps: of the whole image.
        preview: a small image of what is there by now, where one was asked for and it is its turn.
    """

    step: int
    steps: int
    preview: Pixels | None = None


@dataclass(frozen=True)
class DrawnImage:
    """An image that is done.

    Attributes:
        pixels: of it.
        seconds: that the ranks took; of all images of a batch together, shared out evenly.
        sent_bytes, waited_seconds: of one rank; shared out likewise.
    """

    pixels: Pixels
    seconds: float = 0.0
    sent_bytes: int = 0
    waited_seconds: float = 0.0


@dataclass(frozen=True)
class ModelFacts:
    """What the ranks say of the model when it is loaded.

    Attributes:
        model: as ``--model`` names it.
        pipeline: the class of its pipeline.
        parallel: a line on strategy and ranks, for people.
        ranks: processes that make one image.
        width, height, steps, guidance_scale, negative_prompt: what an image has that does not say; None for the
            pipeline's own.
        edits: "image" where it can start from an image, "inpaint" where from an image and a mask.
        schedulers: names that an image may give; the model's own comes without a name.
        scheduler: the class of the model's own.
        takes_lora: whether LoRA can be applied for one image.
        takes_batches: whether several images can be made in one call.
    """

    model: str
    pipeline: str = ""
    parallel: str = ""
    ranks: int = 1
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    edits: tuple[str, ...] = ()
    schedulers: tuple[str, ...] = ()
    scheduler: str = ""
    takes_lora: bool = False
    takes_batches: bool = False

    @classmethod
    def from_wire(cls, values: Mapping[str, Any]) -> ModelFacts:
        """Return the facts that ``asdict`` wrote and JSON has carried."""
        return cls(**{**values, "edits": tuple(values["edits"]), "schedulers": tuple(values["schedulers"])})
