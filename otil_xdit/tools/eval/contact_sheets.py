"""Contact sheets: one process's image, then each variant's with its difference from it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from otil_xdit.tools.eval.cache import ImageCache
from otil_xdit.tools.eval.matrix import Case, Matrix
from otil_xdit.tools.eval.rows import Row

if TYPE_CHECKING:
    from PIL import Image

AMPLIFIED = 8
"""What a difference map multiplies absolute differences by."""

MARGIN = 8
LINE = 15
FONT = 12
LEAST_SIDE = 160
"""Smaller images are enlarged by a whole number, so that captions fit; in pixels."""


@dataclass(frozen=True)
class Column:
    """One variant's images.

    Attributes:
        title: its name and bytes.
        images: float32 [3, H, W] in 0..1, one for each row of the sheet.
        notes: one for each row: PSNR.
    """

    title: str
    images: tuple[torch.Tensor, ...]
    notes: tuple[str, ...]


def write_sheets(out: Path, matrix: Matrix, cache: ImageCache, rows: Mapping[Case, Row], count: int) -> None:
    """Write a contact sheet for each model, equivalent, sampler and number of ranks.

    Args:
        out: folder.
        matrix: what was made.
        cache: has the images.
        rows: the figures of each case, those that failed too.
        count: the most images of a variant on a sheet.
    """
    labels = [f"{call.prompt}, seed {call.seed}" for call in matrix.calls[:count]]
    for ranks in matrix.ranks:
        for reference, equivalent in product(matrix.references, matrix.equivalents):
            done = [
                (_images(cache, case, count), rows[case])
                for case in matrix.cases(ranks)
                if (case.reference, case.equivalent) == (reference, equivalent) and not rows[case].error
            ]
            if done:
                changed = "" if equivalent is None else f"-{equivalent.text.replace(':', '-')}"
                label, sampler = f"{reference.model.label}{changed}", reference.sampler
                halves = "-cfg" if matrix.cfg_parallel else ""
                title = f"{label}, {ranks} ranks, {sampler.name}, {sampler.steps} steps"
                page = sheet(title, labels, _images(cache, reference, count), [_column(*one) for one in done])
                page.save(out / f"sheet-{label}-{ranks}{halves}-{sampler.name}-{sampler.steps}.png")


def _images(cache: ImageCache, case: Case, count: int) -> tuple[torch.Tensor, ...]:
    """Return a case's images; of a clip the frames beside each other."""
    images = (drawn.image for drawn in cache.load(case)[:count])
    return tuple(torch.cat(list(image), dim=-1) if image.ndim == 4 else image for image in images)


def _column(images: tuple[torch.Tensor, ...], row: Row) -> Column:
    title = f"{row.variant}: {(row.kv_bytes or 0) / 1e3:.1f} kB of K/V a step, {row.psnr:.1f} dB"
    return Column(title, images, tuple(f"{value:.1f} dB" for value in row.psnrs[: len(images)]))


def sheet(
    title: str, labels: Sequence[str], references: Sequence[torch.Tensor], columns: Sequence[Column]
) -> Image.Image:
    """Return a page with a row for each label: one process's image, and each column's beside its difference.

    Args:
        title: stands above all.
        labels: prompt and seed of each row.
        references: of one process, float32 [3, H, W] in 0..1, one for each label.
        columns: the variants.
    """
    from PIL import Image, ImageDraw, ImageFont

    scale = -(-LEAST_SIDE // references[0].shape[-1])
    height, width = (side * scale for side in references[0].shape[-2:])
    pair = 2 * width + MARGIN
    titles = [textwrap.wrap(column.title, max(1, pair // (FONT * 6 // 10))) for column in columns]
    top = MARGIN + LINE + LINE * max([1, *map(len, titles)]) + MARGIN
    step = height + 2 * LINE + MARGIN
    size = (MARGIN + width + MARGIN + len(columns) * (pair + 2 * MARGIN), top + len(labels) * step)
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(FONT)

    def write(left: int, top: int, text: str) -> None:
        draw.text((left, top), text, "black", font)

    def paste(left: int, top: int, image: torch.Tensor) -> None:
        values = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        page.paste(Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST), (left, top))

    write(MARGIN, MARGIN, f"{title}; differences x {AMPLIFIED}")
    write(MARGIN, MARGIN + LINE, "one process")
    for row, (label, reference) in enumerate(zip(labels, references, strict=True)):
        write(MARGIN, top + row * step, label)
        paste(MARGIN, top + row * step + LINE, reference)
    for index, (column, lines) in enumerate(zip(columns, titles, strict=True)):
        left = width + 3 * MARGIN + index * (pair + 2 * MARGIN)
        for number, line in enumerate(lines):
            write(left, MARGIN + LINE + number * LINE, line)
        for row, (image, note) in enumerate(zip(column.images, column.notes, strict=True)):
            down = top + row * step + LINE
            paste(left, down, image)
            paste(left + width + MARGIN, down, difference(image, references[row]))
            write(left, down + height, note)
    return page


def difference(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the absolute difference, `AMPLIFIED` times, cut off at 1."""
    return ((image - reference).abs() * AMPLIFIED).clamp(0, 1)
