"""What is known of a model's picture before its weights load: how many rows it has, and how xDiT cuts them.

Latent pixels: image pixels / `vae`. A token is `patch` x `patch` latent pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Cut = Literal["rows", "tokens", "padded"]
"""What xDiT must be able to divide by the number of ranks: rows of tokens, tokens, or nothing (it pads)."""


@dataclass(frozen=True)
class Geometry:
    """Facts of one model family.

    Attributes:
        models: names in xfuser's registry, without the owner, in lower case.
        vae: image pixels of a latent pixel, per side.
        patch: latent pixels of a token, per side.
        cut: what has to divide.
        height, width: the runner's default, in image pixels.
    """

    models: tuple[str, ...]
    vae: int
    patch: int
    cut: Cut
    height: int
    width: int


GEOMETRIES = (
    Geometry(("tiny-dit",), vae=4, patch=2, cut="rows", height=128, width=128),
    Geometry(("sd3.5", "stable-diffusion-3.5-large"), vae=8, patch=2, cut="rows", height=1024, width=1024),
    Geometry(("flux.1-dev", "flux.2-dev"), vae=8, patch=2, cut="tokens", height=1024, width=1024),
    Geometry(("flux.2-klein-4b", "flux.2-klein-9b"), vae=8, patch=2, cut="tokens", height=2048, width=2048),
    Geometry(("qwen-image", "qwen-image-2512"), vae=8, patch=2, cut="padded", height=928, width=1664),
    Geometry(("z-image", "z-image-turbo"), vae=8, patch=2, cut="padded", height=1024, width=1024),
    Geometry(
        ("wan2.1-t2v", "wan2.1-t2v-14b-diffusers", "wan2.2-t2v", "wan2.2-t2v-a14b-diffusers"),
        vae=8,
        patch=2,
        cut="padded",
        height=720,
        width=1280,
    ),
)


def geometry_of(model: str | None) -> Geometry | None:
    """The facts of a model by its name in xfuser's registry; None where they are not known."""
    name = (model or "").rsplit("/", 1)[-1].lower()
    return next((geometry for geometry in GEOMETRIES if name in geometry.models), None)


def check_geometry(values: Mapping[str, Any], patch_degree: int, ulysses_degree: int, block: int | None) -> None:
    """Refuse an image that cannot be cut into the patches, and a sub-block larger than one; unknown models pass.

    Args:
        values: flags by name: ``model``, ``height``, ``width``.
        patch_degree, ulysses_degree: the two cuts of the rows, one inside the other.
        block: side of a sub-block in latent pixels, or None.

    Raises:
        ValueError: naming the flag and what would be accepted.
    """
    geometry = geometry_of(values.get("model"))
    if geometry is None:
        return
    height, width = values.get("height") or geometry.height, values.get("width") or geometry.width
    ranks = patch_degree * ulysses_degree
    if geometry.cut == "rows":
        _check_rows(geometry, height, ranks)
    else:
        _check_tokens(geometry, height, width, ranks)
    side = min(height // geometry.vae // ranks, width // geometry.vae)
    if block is not None and block > side:
        raise ValueError(
            f"--otil_block {block} is larger than a patch: {height} x {width} pixels on {ranks} ranks give each "
            f"{height // geometry.vae // ranks} x {width // geometry.vae} latent pixels; give at most {side}"
        )


def _check_rows(geometry: Geometry, height: int, ranks: int) -> None:
    step = geometry.vae * geometry.patch * ranks
    if height < step or height % step:
        raise ValueError(
            f"--height {height} cannot be cut into {ranks} patches of whole rows of tokens; give a multiple of {step} "
            f"({geometry.vae * geometry.patch} pixels a token x {ranks} patches)"
        )


def _check_tokens(geometry: Geometry, height: int, width: int, ranks: int) -> None:
    side = geometry.vae * geometry.patch
    rows, tokens = height // side, (height // side) * (width // side)
    if rows < ranks or (geometry.cut == "tokens" and tokens % ranks):
        raise ValueError(
            f"--height {height} cannot be cut into {ranks} patches: {rows} x {width // side} = {tokens} tokens; give a "
            f"multiple of {side * ranks} ({side} pixels a token x {ranks} patches)"
        )
