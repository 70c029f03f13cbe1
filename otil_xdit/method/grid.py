"""Geometry: how rows become patches, and how a rank's tokens become sub-blocks.

Shapes: S tokens of one rank, K sub-blocks, T tokens of one sub-block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

TextPosition = Literal["front", "rear", "none"]


def split_rows(rows: int, parts: int, shares: Sequence[int] = ()) -> tuple[int, ...]:
    """Cut `rows` into `parts` patches: of heights that differ by at most one, the taller ones first, or by shares.

    Args:
        rows: their number.
        parts: number of patches.
        shares: of each patch, in any unit; empty for equal ones. A patch gets its share of the rows, rounded, and one
            row at least.

    Returns:
        The heights.

    Raises:
        ValueError: when a patch would be empty.
    """
    if parts < 1 or rows < parts:
        raise ValueError(f"{rows} rows cannot be cut into {parts} patches; give at least one row a patch")
    if not shares:
        height, taller = divmod(rows, parts)
        return tuple(height + (index < taller) for index in range(parts))
    assert len(shares) == parts, f"{len(shares)} shares for {parts} patches"
    wanted = [rows * share / sum(shares) for share in shares]
    heights = [max(1, math.floor(height)) for height in wanted]
    while sum(heights) != rows:
        step = 1 if sum(heights) < rows else -1
        movable = [index for index in range(parts) if heights[index] + step >= 1]
        heights[max(movable, key=lambda index: step * (wanted[index] - heights[index]))] += step
    return tuple(heights)


@dataclass(frozen=True)
class LevelGrid:
    """The feature maps of a U-Net, cut by rows, at each resolution.

    The cut is made where the map is smallest and doubled upwards. So a row has the same owner at every level, a
    sub-block of the latent is the same place at every level, and a down-sampling convolution needs the row above alone.
    In exchange patches may differ by as many latent pixels as one row of the smallest map covers.

    Attributes:
        heights, widths: of each level's map, finest first.
        rows: rows of every rank, by level.
    """

    heights: tuple[int, ...]
    widths: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]

    @classmethod
    def build(cls, height: int, width: int, levels: int, ranks: int, shares: Sequence[int] = ()) -> LevelGrid:
        """Cut a `height` x `width` map that shrinks by two, rounded up, at each of `levels` levels but the first.

        `shares` are as those of `split_rows`, which cuts the smallest map.

        Raises:
            ValueError: when the smallest map has fewer rows than there are ranks.
        """
        heights, widths = [height], [width]
        for _ in range(levels - 1):
            heights.append(-(-heights[-1] // 2))
            widths.append(-(-widths[-1] // 2))
        if heights[-1] < ranks:
            least = 1 + 2 ** (levels - 1) * (ranks - 1)
            raise ValueError(
                f"{height} rows of the latent are {heights[-1]} at the U-Net's lowest resolution, which {ranks} ranks "
                f"cannot share; give at least {least} rows of the latent, or fewer ranks"
            )
        starts = [0]
        for rows in split_rows(heights[-1], ranks, shares)[:-1]:
            starts.append(starts[-1] + rows)
        cuts = []
        for level, rows in enumerate(heights):
            edges = [start << (levels - 1 - level) for start in starts] + [rows]
            cuts.append(tuple(end - start for start, end in pairwise(edges)))
        return cls(tuple(heights), tuple(widths), tuple(cuts))

    def slice_of(self, level: int, rank: int) -> slice:
        """Return the rows of `rank` in the whole map of `level`."""
        start = sum(self.rows[level][:rank])
        return slice(start, start + self.rows[level][rank])

    def level_of(self, height: int, width: int) -> int:
        """Return the level whose map has this size.

        Raises:
            ValueError: when none has.
        """
        sizes = list(zip(self.heights, self.widths, strict=True))
        if (height, width) not in sizes:
            known = ", ".join(f"{rows} x {cols}" for rows, cols in sizes)
            raise ValueError(f"a map of {height} x {width} belongs to no level of the U-Net; its maps are {known}")
        return sizes.index((height, width))

    def is_part(self, height: int, width: int, rank: int) -> bool:
        """Return whether a map of this size can be a rank's part of some level's map, and not a whole one."""
        sizes = zip(self.heights, self.widths, strict=True)
        parts = zip((rows[rank] for rows in self.rows), self.widths, strict=True)
        return (height, width) not in sizes and (height, width) in parts

    def is_even(self, level: int) -> bool:
        """Return whether all ranks have equally many rows at a level."""
        return len(set(self.rows[level])) == 1


def kept_tokens(counts: Sequence[int], chunk: int) -> torch.Tensor:
    """Return the positions of the real tokens where chunks of `counts` tokens are padded to `chunk`; int64 [sum]."""
    return torch.cat([torch.arange(count) + chunk * index for index, count in enumerate(counts)])


@dataclass(frozen=True)
class Segment:
    """A run of consecutive tokens of one rank: a `rows` x `cols` image in row order, or text (one row)."""

    rows: int
    cols: int
    is_image: bool = True

    @property
    def tokens(self) -> int:
        return self.rows * self.cols


def block_table(segments: Sequence[Segment], side: int) -> torch.Tensor:
    """Return the positions of every sub-block's tokens in a rank's sequence.

    Image segments are cut into `side` x `side` tokens; text, and images narrower than a sub-block, into runs of
    `side`**2 tokens. Where the size does not divide, the last sub-block moves back and overlaps its neighbour: every
    sub-block has the same T tokens (fixed shapes), and every token is covered.

    Returns:
        int64 [K, T]; T is `side`**2, or the shortest segment's length where that is smaller.

    Raises:
        ValueError: for an empty segment or a side below 1.
    """
    if side < 1 or not segments or any(segment.tokens < 1 for segment in segments):
        raise ValueError(f"sub-blocks of side {side} do not fit segments {list(segments)}")
    run = min(side * side, *(segment.tokens for segment in segments))
    tables, start = [], 0
    for segment in segments:
        square = segment.is_image and run == side * side and min(segment.rows, segment.cols) >= side
        table = _squares(segment.rows, segment.cols, side) if square else _runs(segment.tokens, run)
        tables.append(table + start)
        start += segment.tokens
    return torch.cat(tables)


@dataclass(frozen=True)
class TokenLayout:
    """The parts of one rank's attention sequence.

    Attributes:
        rows, cols: image tokens of one chunk; ``rows=0`` where the model's order is not known, and then the sequence is
            cut into runs of tokens instead of squares.
        pixels: side of one token in latent pixels.
        text: where a chunk's share of the text tokens stands, if they are part of the sequence at all.
        chunks: consecutive chunks in the sequence; the Ulysses degree, whose all-to-all joins that many.
    """

    rows: int = 0
    cols: int = 0
    pixels: int = 1
    text: TextPosition = "none"
    chunks: int = 1

    @property
    def image_tokens(self) -> int:
        return self.rows * self.cols

    @property
    def is_image_only(self) -> bool:
        """Tell whether the image's tokens are known to be all of the sequence, whatever the prompt is."""
        return self.rows > 0 and self.text == "none"

    def segments(self, tokens: int) -> list[Segment]:
        """Cut a sequence of `tokens` tokens into its segments, in order."""
        chunk, rest = divmod(tokens, self.chunks)
        text_tokens = chunk - self.image_tokens
        fits = rest == 0 and (text_tokens == 0 or (text_tokens > 0 and self.text != "none"))
        if self.rows == 0 or not fits:
            return [Segment(1, tokens, is_image=False)]
        image = Segment(self.rows, self.cols)
        text = [Segment(1, text_tokens, is_image=False)] if text_tokens else []
        return (text + [image] if self.text == "front" else [image] + text) * self.chunks


def image_positions(segments: Sequence[Segment]) -> torch.Tensor:
    """Return each token's number among the image tokens of its rank, or -1 for text; int64 [S]."""
    is_image = torch.cat([torch.full((segment.tokens,), segment.is_image) for segment in segments])
    return torch.where(is_image, is_image.cumsum(0) - 1, -1)


def pixel_table(tokens: torch.Tensor, cols: int, side: int) -> torch.Tensor:
    """Return the latent pixels under sub-blocks of an image, in row order within each sub-block.

    Args:
        tokens: int64 [K, T], image tokens of each sub-block, numbered by rows; T a square number or a run.
        cols: tokens of one row of the image.
        side: latent pixels a side of a token.

    Returns:
        int64 [K, T * side**2].
    """
    blocks, count = tokens.shape
    width = math.isqrt(count) if math.isqrt(count) ** 2 == count else count
    inside = torch.arange(side, device=tokens.device)
    top = (tokens // cols * side).view(blocks, -1, 1, width, 1) + inside.view(-1, 1, 1)
    left = (tokens % cols * side).view(blocks, -1, 1, width, 1) + inside
    return (top * (cols * side) + left).flatten(1)


def _starts(length: int, size: int) -> torch.Tensor:
    """Return the starts of the windows of `size` that cover range(length); the last one is moved back to fit."""
    return torch.arange(0, length, size).clamp_(max=length - size)


def _runs(tokens: int, run: int) -> torch.Tensor:
    """Cut tokens into runs; int64 [K, run]."""
    return _starts(tokens, run)[:, None] + torch.arange(run)


def _squares(rows: int, cols: int, side: int) -> torch.Tensor:
    """Cut a `rows` x `cols` image of tokens into squares; int64 [K, side**2]."""
    top, left = torch.meshgrid(_starts(rows, side), _starts(cols, side), indexing="ij")
    corner = (top * cols + left).reshape(-1, 1)
    inside = (torch.arange(side)[:, None] * cols + torch.arange(side)).reshape(1, -1)
    return corner + inside
