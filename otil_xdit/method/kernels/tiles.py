"""How the programs of a kernel share keys and values, and what they leave for the next kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ROWS = 32
"""Tokens of a program, so that the matrices of a layer are read as seldom as its copies."""

_COLUMNS, _CHUNK = 32, 16
"""Features of a head that a program computes at once, and those that it multiplies at once for them."""

_PROGRAMS = 256
"""Programs that keep a card busy: about two for each multiprocessor."""

_MOST_PARTS = 8
"""Parts that heads are shared out to, at most."""


@dataclass(frozen=True)
class Tiles:
    """A grid of programs over one rank's keys and values of a layer: tokens, parts of the heads, and images.

    Attributes:
        rows: tokens of a program.
        tiles: programs that it takes for all tokens.
        parts: programs that share the heads.
        images: keys' and values' images, 2 * B.
    """

    rows: int
    tiles: int
    parts: int
    images: int

    @classmethod
    def of(cls, batch: int, tokens: int) -> Tiles:
        """Return the grid for so many images and tokens; the number of heads is not in it."""
        tiles = -(-tokens // _ROWS)
        parts = min(max(-(-_PROGRAMS // (tiles * 2 * batch)), 1), _MOST_PARTS)
        return cls(_ROWS, tiles, parts, 2 * batch)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.tiles, self.parts, self.images

    def constants(self, heads: int, size: int) -> dict[str, int]:
        """Return how a program goes through its part of H heads of d features: the constants of its kernel."""
        split = -(-size // _COLUMNS)
        return {
            "D": size,
            "SPLIT": split,
            "COLUMNS": _COLUMNS,
            "CHUNK": _CHUNK,
            "ROWS": self.rows,
            "UNITS": -(-heads // self.parts) * split,
        }

    @property
    def programs(self) -> int:
        return self.tiles * self.parts * self.images


@dataclass(frozen=True)
class ChangeSums:
    """What is known of how a rank's keys and values of L layers changed, once a kernel has read them.

    With r what the prediction of a number lacks, and u the velocity of its copy.

    Attributes:
        tokens: sums of r * r over a token's heads of a part, float32 [L, parts, 2 * B, S].
        totals: sums of r * u and u * u over what a program read, float32 [L, 2, programs / 2, 2], keys first.
        numbers: sums of the keys and values that a program read, float32 [L, programs]: NaN or Inf if one was.
    """

    tokens: torch.Tensor
    totals: torch.Tensor
    numbers: torch.Tensor

    @classmethod
    def make(cls, layers: int, batch: int, tokens: int, device: torch.device) -> ChangeSums:
        """Return room for layers of B images and S tokens."""
        tiles = Tiles.of(batch, tokens)

        def room(*shape: int) -> torch.Tensor:
            return torch.zeros(layers, *shape, dtype=torch.float32, device=device)

        return cls(room(tiles.parts, tiles.images, tokens), room(2, tiles.programs // 2, 2), room(tiles.programs))

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.totals.nbytes + self.numbers.nbytes
