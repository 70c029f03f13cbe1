"""Images from bodies and into bodies. Nothing else of a request is ever opened or fetched."""

from __future__ import annotations

import io
import warnings
from typing import Literal

from PIL import Image, ImageOps

from otil_xdit.serve.problems import Problem
from otil_xdit.serve.requests import Pixels

ImageFormat = Literal["png", "jpeg", "webp"]

ACCEPTED = ("PNG", "JPEG", "WEBP")
"""Formats that are read, by Pillow's names; its other decoders are never asked."""


def encode(pixels: Pixels, output_format: ImageFormat = "png", quality: int | None = None) -> bytes:
    """Return an image as a file's bytes.

    Args:
        quality: from 0 to 100, of JPEG and WebP; None for Pillow's own.
    """
    image = Image.frombytes(pixels.mode, (pixels.width, pixels.height), pixels.data)
    file = io.BytesIO()
    image.save(file, output_format, **({} if quality is None or output_format == "png" else {"quality": quality}))
    return file.getvalue()


def decode(data: bytes, field: str, max_pixels: int) -> Image.Image:
    """Return an image from a body, in RGB or RGBA, upright.

    The size is read from the file's head, before anything is unpacked.

    Args:
        field: of the request, for messages.
        max_pixels: that it may have.

    Raises:
        Problem: 400 for what is no image; 413 for one of too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
            image: Image.Image = Image.open(io.BytesIO(data), formats=ACCEPTED)
        if image.width * image.height > max_pixels:
            raise Problem(
                413,
                f"{field} has {image.width} x {image.height} pixels; give one of at most {max_pixels}",
                field,
                "image_too_large",
            )
        image.load()
        image = ImageOps.exif_transpose(image)
        return image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
    except Problem:
        raise
    except Image.DecompressionBombError as error:
        raise Problem(413, f"{field} has too many pixels", field, "image_too_large") from error
    except Exception as error:  # Pillow's decoders raise many kinds
        raise Problem(400, f"{field} cannot be read; give a PNG, JPEG or WebP file", field, "invalid_image") from error


def fitted(image: Image.Image, width: int, height: int) -> Pixels:
    """Return an image in RGB, scaled to a size; what is transparent shows its own colours."""
    image = image.convert("RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return Pixels(width, height, "RGB", image.tobytes())


def mask_of(image: Image.Image, width: int, height: int) -> Pixels:
    """Return a mask, white where the image is to be made anew.

    OpenAI's masks are transparent there. A mask without transparency is taken by its brightness, white for anew, as
    diffusers and AUTOMATIC1111 have it.
    """
    if "A" in image.getbands():
        mask = ImageOps.invert(image.getchannel("A"))
    else:
        mask = image.convert("L")
    if mask.size != (width, height):
        mask = mask.resize((width, height), Image.Resampling.NEAREST)
    return Pixels(width, height, "L", mask.tobytes())
