"""Contact sheets: one process's image, then each variant's with its difference from it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

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


def sheet(
    title: str, labels: Sequence[str], references: Sequence[torch.Tensor], columns: Sequence[Column]
) -> Image.Image:
    """A row for each label: one process's image, and each column's beside its amplified difference.

    Args:
        title: stands above all.
        labels: prompt and seed of each row.
        references: of one process, one for each label.
        columns: the variants.
    """
    from PIL import Image, ImageDraw, ImageFont

    side = references[0].shape[-1]
    scale = -(-LEAST_SIDE // side)
    width, height = side * scale, references[0].shape[-2] * scale
    pair = 2 * width + MARGIN
    letters = max(1, pair // (FONT * 6 // 10))
    titles = [textwrap.wrap(column.title, letters) for column in columns]
    top = MARGIN + LINE + LINE * max([1, *map(len, titles)]) + MARGIN
    step = height + 2 * LINE + MARGIN
    size = (MARGIN + width + MARGIN + len(columns) * (pair + 2 * MARGIN), top + len(labels) * step)
    page = Image.new("RGB", size, "white")
    pen = _Pen(page, ImageDraw.Draw(page), ImageFont.load_default(FONT), (width, height))
    pen.write(MARGIN, MARGIN, f"{title}; differences x {AMPLIFIED}")
    pen.write(MARGIN, MARGIN + LINE, "one process")
    for row, (label, reference) in enumerate(zip(labels, references, strict=True)):
        pen.write(MARGIN, top + row * step, label)
        pen.paste(MARGIN, top + row * step + LINE, reference)
    for index, (column, lines) in enumerate(zip(columns, titles, strict=True)):
        left = width + 3 * MARGIN + index * (pair + 2 * MARGIN)
        for number, line in enumerate(lines):
            pen.write(left, MARGIN + LINE + number * LINE, line)
        for row, (image, note) in enumerate(zip(column.images, column.notes, strict=True)):
            down = top + row * step + LINE
            pen.paste(left, down, image)
            pen.paste(left + width + MARGIN, down, difference(image, references[row]))
            pen.write(left, down + height, note)
    return page


def difference(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Absolute difference, `AMPLIFIED` times, cut off at 1."""
    return ((image - reference).abs() * AMPLIFIED).clamp(0, 1)


@dataclass(frozen=True)
class _Pen:
    page: Image.Image
    draw: ImageDraw.ImageDraw
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    size: tuple[int, int]

    def write(self, left: int, top: int, text: str) -> None:
        self.draw.text((left, top), text, "black", self.font)

    def paste(self, left: int, top: int, image: torch.Tensor) -> None:
        from PIL import Image

        values = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        drawn = Image.fromarray(values)
        self.page.paste(drawn.resize(self.size, Image.Resampling.NEAREST), (left, top))
