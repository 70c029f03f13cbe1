"""Whether an image can be cut into patches: how many rows a model's image has, and how they are cut.

Latent pixels: image pixels / `vae`. A token is `patch` x `patch` latent pixels. A U-Net has no tokens to divide, but as
many rows at its lowest resolution as there are ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from otil_xdit.catalog.dits import DitRecord
from otil_xdit.catalog.models import find_dit, find_unet
from otil_xdit.catalog.unets import UnetRecord
from otil_xdit.method.grid import LevelGrid

DIVISOR = 8
"""Height and width of a U-Net's image are multiples of this, by diffusers' own rule."""


def check_geometry(
    values: Mapping[str, Any], patch_degree: int, ulysses_degree: int, block: int | None, shares: tuple[int, ...] = ()
) -> None:
    """Refuse an image that cannot be cut into the patches, and a sub-block larger than one; unknown models pass.

    Args:
        values: flags by name: ``model``, ``height``, ``width``.
        patch_degree, ulysses_degree: the two cuts of the rows, one inside the other.
        block: side of a sub-block in latent pixels, or None.
        shares: of the patches of a U-Net; empty for equal ones.

    Raises:
        ValueError: naming the flag and what would be accepted.
    """
    model = values.get("model")
    unet = find_unet(model) if isinstance(model, str) else None
    if unet is not None:
        _check_unet(unet, values, patch_degree, ulysses_degree, block, shares)
        return
    dit = find_dit(model)
    if dit is None:
        return
    height, width = values.get("height") or dit.height, values.get("width") or dit.width
    ranks = patch_degree * ulysses_degree
    if dit.cut == "rows":
        _check_rows(dit, height, ranks)
    else:
        _check_tokens(dit, height, width, values.get("num_frames") or dit.frames, ranks)
    rows, cols = height // dit.vae // ranks, width // dit.vae
    _check_block(block, rows, cols, f"{height} x {width} pixels on {ranks} ranks")


def _check_rows(dit: DitRecord, height: int, ranks: int) -> None:
    side, least = dit.vae * dit.patch, dit.vae * dit.patch * ranks
    step = side if dit.facts.call == "rows" else least
    if height < least or height % step:
        whole = (
            f"from {least} up ({side} pixels a token)" if step == side else f"({side} pixels a token x {ranks} patches)"
        )
        raise ValueError(
            f"--height {height} cannot be cut into {ranks} patches of whole rows of tokens; give a multiple of {step} "
            f"{whole}"
        )


def _check_tokens(dit: DitRecord, height: int, width: int, frames: int, ranks: int) -> None:
    side = dit.vae * dit.patch
    rows, cols, times = height // side, width // side, dit.latent_frames(frames)
    tokens = rows * cols * times
    if tokens < ranks:
        counts = f"{rows} x {cols}" + (f" x {times} frames" if dit.frames else "")
        raise ValueError(
            f"--height {height} cannot be cut into {ranks} patches: {counts} = {tokens} tokens; give a "
            f"multiple of {side * ranks} ({side} pixels a token x {ranks} patches)"
        )


def _check_block(block: int | None, rows: int, cols: int, image: str) -> None:
    """Refuse a sub-block of more than a patch of `rows` x `cols` latent pixels."""
    if block is not None and block > min(rows, cols):
        raise ValueError(
            f"--otil_block_size {block} is larger than a patch: {image} leave the smallest {rows} x {cols} latent "
            f"pixels; give at most {min(rows, cols)}"
        )


def _check_unet(
    unet: UnetRecord,
    values: Mapping[str, Any],
    patch_degree: int,
    ulysses_degree: int,
    block: int | None,
    shares: tuple[int, ...],
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
    by_rank = [share for share in shares for _ in range(ulysses_degree)]
    smallest = min(LevelGrid.build(rows, cols, unet.levels, ranks, by_rank).rows[0])
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
