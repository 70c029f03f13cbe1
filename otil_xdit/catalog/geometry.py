"""What is known of a model's picture before its weights load: how many rows it has, and how they are cut.

Latent pixels: image pixels / `vae`. A token is `patch` x `patch` latent pixels. A U-Net has no tokens to divide, but as
many rows at its lowest resolution as there are ranks (`otil_xdit.catalog.unets`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from otil_xdit.catalog.unets import UnetFacts, facts_of
from otil_xdit.method.grid import LevelGrid

Cut = Literal["rows", "tokens", "padded"]
"""What must divide by the number of ranks: rows of tokens, tokens, or nothing (xDiT pads and stays exact)."""

DIVISOR = 8
"""Height and width of a U-Net's picture are multiples of this, by diffusers' own rule."""


@dataclass(frozen=True)
class Geometry:
    """Facts of one model family.

    Attributes:
        models: names in xfuser's registry, without the owner, in lower case.
        vae: image pixels of a latent pixel, per side.
        patch: latent pixels of a token, per side.
        cut: what has to divide.
        height, width: the runner's default, in image pixels.
        frames: the runner's default, or 0 for pictures.
    """

    models: tuple[str, ...]
    vae: int
    patch: int
    cut: Cut
    height: int
    width: int
    frames: int = 0

    def latent_frames(self, frames: int) -> int:
        """Frames of the latent: one for the first of a video, and one for every four after it."""
        return 1 + frames // 4 if self.frames else 1


GEOMETRIES = (
    Geometry(("tiny-dit",), vae=4, patch=2, cut="rows", height=128, width=128),
    Geometry(("sd3.5", "stable-diffusion-3.5-large"), vae=8, patch=2, cut="rows", height=1024, width=1024),
    Geometry(("flux.1-dev", "flux.2-dev"), vae=8, patch=2, cut="tokens", height=1024, width=1024),
    Geometry(("flux.2-klein-4b", "flux.2-klein-9b"), vae=8, patch=2, cut="tokens", height=2048, width=2048),
    Geometry(("qwen-image", "qwen-image-2512"), vae=8, patch=2, cut="tokens", height=928, width=1664),
    Geometry(("z-image", "z-image-turbo"), vae=8, patch=2, cut="padded", height=1024, width=1024),
    Geometry(
        ("wan2.1-t2v", "wan2.1-t2v-14b-diffusers", "wan2.2-t2v", "wan2.2-t2v-a14b-diffusers"),
        vae=8,
        patch=2,
        cut="tokens",
        height=720,
        width=1280,
        frames=81,
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
    model = values.get("model")
    unet = facts_of(model) if isinstance(model, str) else None
    if unet is not None:
        _check_unet(unet, values, patch_degree, ulysses_degree, block)
        return
    geometry = geometry_of(model)
    if geometry is None:
        return
    height, width = values.get("height") or geometry.height, values.get("width") or geometry.width
    ranks = patch_degree * ulysses_degree
    if geometry.cut == "rows":
        _check_rows(geometry, height, ranks)
    else:
        _check_tokens(geometry, height, width, values.get("num_frames") or geometry.frames, ranks)
    rows, cols = height // geometry.vae // ranks, width // geometry.vae
    _check_block(block, rows, cols, f"{height} x {width} pixels on {ranks} ranks")


def _check_rows(geometry: Geometry, height: int, ranks: int) -> None:
    step = geometry.vae * geometry.patch * ranks
    if height < step or height % step:
        raise ValueError(
            f"--height {height} cannot be cut into {ranks} patches of whole rows of tokens; give a multiple of {step} "
            f"({geometry.vae * geometry.patch} pixels a token x {ranks} patches)"
        )


def _check_tokens(geometry: Geometry, height: int, width: int, frames: int, ranks: int) -> None:
    side = geometry.vae * geometry.patch
    rows, cols, times = height // side, width // side, geometry.latent_frames(frames)
    tokens = rows * cols * times
    if rows < ranks or (geometry.cut == "tokens" and tokens % ranks):
        counts = f"{rows} x {cols}" + (f" x {times} frames" if geometry.frames else "")
        raise ValueError(
            f"--height {height} cannot be cut into {ranks} patches: {counts} = {tokens} tokens; give a "
            f"multiple of {side * ranks} ({side} pixels a token x {ranks} patches)"
        )


def _check_block(block: int | None, rows: int, cols: int, picture: str) -> None:
    """Refuse a sub-block of more than a patch of `rows` x `cols` latent pixels."""
    if block is not None and block > min(rows, cols):
        raise ValueError(
            f"--otil_block_size {block} is larger than a patch: {picture} leave the smallest {rows} x {cols} latent "
            f"pixels; give at most {min(rows, cols)}"
        )


def _check_unet(
    unet: UnetFacts, values: Mapping[str, Any], patch_degree: int, ulysses_degree: int, block: int | None
) -> None:
    sizes = {flag: values.get(flag) or getattr(unet, flag) for flag in ("height", "width")}
    for flag, size in sizes.items():
        if size < DIVISOR or size % DIVISOR:
            raise ValueError(f"--{flag} {size} is not possible with {unet.label}; give a multiple of {DIVISOR}")
    check_heads(unet.heads, ulysses_degree, unet.label)
    height, ranks = sizes["height"], patch_degree * ulysses_degree
    rows, cols = height // unet.vae, sizes["width"] // unet.vae
    halvings = 2 ** (unet.levels - 1)
    lowest = math.ceil(rows / halvings)
    if lowest < ranks:
        least = math.ceil((1 + halvings * (ranks - 1)) * unet.vae / DIVISOR) * DIVISOR
        raise ValueError(
            f"--height {height} cannot be cut into {ranks} patches: {unet.label} is only {lowest} high at its lowest "
            f"resolution; give at least {least}, or fewer ranks"
        )
    smallest = min(LevelGrid.build(rows, cols, unet.levels, ranks).rows[0])
    _check_block(block, smallest, cols, f"{height} x {sizes['width']} pixels on {ranks} ranks")


def check_heads(heads: tuple[int, ...], ulysses_degree: int, name: str) -> None:
    """Refuse a Ulysses degree that does not divide the attention heads of every level.

    Raises:
        ValueError: naming the flag and the degrees that would do.
    """
    common = math.gcd(*heads)
    if common % ulysses_degree:
        accepted = [str(degree) for degree in range(1, common + 1) if common % degree == 0]
        raise ValueError(
            f"--ulysses_degree {ulysses_degree} does not divide the attention heads of {name} "
            f"({', '.join(map(str, heads))}); give {' or '.join(accepted)}"
        )
