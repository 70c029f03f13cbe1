"""How ranks share one call of a U-Net: rows of every map, images of the batch; arguments are cut, results joined.

Shapes: B batch, C channels, H x W the latent, h rows of this rank, b images of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

from otil_xdit.comm.groups import UnetGroups
from otil_xdit.method.grid import LevelGrid, TokenLayout, kept_tokens

_LISTS_OF_MAPS = ("down_block_additional_residuals", "down_intrablock_additional_residuals")
_MAP = "mid_block_additional_residual"
"""Arguments of a U-Net that hold maps (ControlNet, T2I adapters); all others hold at most images of the batch."""


@dataclass(frozen=True)
class UNetSharding:
    """This rank's part of one call.

    Attributes:
        grid: rows of every rank at every level.
        groups: the ranks that share the U-Net.
        batch: images of the whole call.
        images: those that this rank computes.
    """

    grid: LevelGrid
    groups: UnetGroups
    batch: int
    images: slice

    @classmethod
    def of(
        cls, sample: torch.Tensor, levels: int, groups: UnetGroups, cfg_rank: int, splits_batch: bool = True
    ) -> UNetSharding:
        """Share out a call.

        Images of a batch do not see each other, so any split is right, not only that into the two CFG passes. An odd
        batch (one image without guidance) is computed by all CFG groups alike.

        Args:
            sample: the whole latent, [B, C, H, W].
            levels: number of the network's resolutions.
            groups: the ranks that share the U-Net.
            cfg_rank: CFG group whose images this rank computes.
            splits_batch: whether the CFG groups share the images; otherwise each computes all.

        Raises:
            ValueError: for a latent whose rows the ranks cannot share.
        """
        batch, _, height, width = sample.shape
        grid = _grid(height, width, levels, groups.rows.world_size, groups.shares)
        size = batch // groups.cfg_degree if splits_batch and batch % groups.cfg_degree == 0 else batch
        start = cfg_rank * size if size < batch else 0
        return cls(grid, groups, batch, slice(start, start + size))

    # ---- cutting -------------------------------------------------------------------------------------------------

    def images_of(self, value: torch.Tensor) -> torch.Tensor:
        """Return this rank's images of a tensor that has one entry for each; any other tensor stays whole."""
        return value[self.images] if value.ndim > 0 and value.shape[0] == self.batch else value

    def rows_of(self, value: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows, [B, C, h, cols], of a map of any level, [B, C, rows, cols]."""
        level = self.grid.level_of(*value.shape[-2:])
        return value[..., self.grid.slice_of(level, self.groups.rows.rank), :].contiguous()

    def argument(self, name: str, value: Any) -> Any:
        """Return this rank's part of a named argument of the U-Net."""
        if name in _LISTS_OF_MAPS:
            # A new list: the network takes its entries out one by one.
            return None if value is None else [self._map(one) for one in value]
        if name == _MAP:
            return None if value is None else self._map(value)
        return self._images_within(value)

    def _map(self, value: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a map, [B, C, rows, cols], of any level; it may be that already, or one pixel."""
        value = self.images_of(value)
        rows, cols = value.shape[-2:]
        if (rows, cols) == (1, 1) or self.grid.is_part(rows, cols, self.groups.rows.rank):
            return value
        return self.rows_of(value)

    def _images_within(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.images_of(value)
        if isinstance(value, dict):
            return {key: self._images_within(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._images_within(one) for one in value)
        return value

    # ---- joining -------------------------------------------------------------------------------------------------

    def padded(self, part: torch.Tensor) -> torch.Tensor:
        """Pad this rank's rows of the output, [b, C, h, W], to as many as any rank has."""
        return functional.pad(part, (0, 0, 0, max(self.grid.rows[0]) - part.shape[2])).contiguous()

    def join(self, gathered: Sequence[torch.Tensor] | torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """Join the parts of the output.

        Args:
            gathered: every rank's `padded` part, in the order of the replica.
            part: this rank's, [b, C, h, W].

        Returns:
            The whole output, [B, C, H, W].
        """
        rows, size = self.grid.rows[0], part.shape[0]
        whole = part.new_empty(self.batch, part.shape[1], self.grid.heights[0], self.grid.widths[0])
        for (cfg_rank, place), theirs in zip(self.groups.places, gathered, strict=True):
            if size == self.batch and cfg_rank > 0:
                continue
            images = slice(cfg_rank * size, (cfg_rank + 1) * size)
            whole[images, :, self.grid.slice_of(0, place)] = theirs[:, :, : rows[place]]
        return whole

    # ---- what layers need ----------------------------------------------------------------------------------------

    def check_halo(self, layer: str, level: int, above: int, below: int) -> None:
        """Validate that every rank has the rows that its neighbours need.

        Raises:
            ValueError: on every rank, naming the layer.
        """
        least = min(self.grid.rows[level])
        if max(above, below) > least:
            raise ValueError(
                f"the layer {layer} needs {max(above, below)} rows of its neighbours, and a rank has {least} there; "
                "give a larger height or fewer ranks"
            )

    def row_shares(self, level: int, device: torch.device) -> torch.Tensor:
        """Return each rank's share of the rows of a level, float32 [N]."""
        return row_shares_of(self.grid, level, device)

    def token_layout(self, level: int) -> TokenLayout:
        """Return the layout of a rank's tokens at a level, where ranks with fewer rows than others pad theirs."""
        rows, cols = max(self.grid.rows[level]), self.grid.widths[level]
        return TokenLayout(rows, cols, 2**level, chunks=self.groups.ulysses_degree)

    def kept_keys(self, level: int, device: torch.device) -> torch.Tensor | None:
        """Return the positions, int64, of real keys among all ranks' padded ones; None where none are padding."""
        return kept_keys_of(self.grid, level, device)


@lru_cache(maxsize=64)
def _grid(height: int, width: int, levels: int, ranks: int, shares: tuple[int, ...]) -> LevelGrid:
    return LevelGrid.build(height, width, levels, ranks, shares)


@lru_cache(maxsize=64)
def kept_keys_of(grid: LevelGrid, level: int, device: torch.device) -> torch.Tensor | None:
    """Return the positions, int64, of real keys among all ranks' padded ones; None where none are padding."""
    if grid.is_even(level):
        return None
    rows, cols = grid.rows[level], grid.widths[level]
    return kept_tokens([count * cols for count in rows], max(rows) * cols).to(device)


@lru_cache(maxsize=64)
def row_shares_of(grid: LevelGrid, level: int, device: torch.device) -> torch.Tensor:
    """Return each rank's share of the rows of a level, float32 [N]."""
    rows = grid.rows[level]
    return (torch.tensor(rows, dtype=torch.float32) / sum(rows)).to(device)
