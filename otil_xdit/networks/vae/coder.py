"""`PatchedCoder`: the encoder or the decoder of a VAE on patches, as it is an `AutoencoderKL`'s.

The pipeline calls it with the whole map on every rank and gets the whole result on every rank. In between each rank
computes its rows, with rows, moments and tokens of the others as they are at that moment, so the result is that of one
device up to rounding.

Shapes: B batch, C channels, T frames, 1 for an image, H x W the map that comes in, h rows of this rank, S = T * h * W
tokens of this rank, d features of a head, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from otil_xdit.exchange.halo import HaloRows
from otil_xdit.exchange.synchronous import SynchronousExchange
from otil_xdit.method.grid import LevelGrid
from otil_xdit.networks.class_swap import is_swapped, subclass_of, swap_class
from otil_xdit.networks.handles import make_order
from otil_xdit.networks.unet.context import CONTEXT, LayerContext
from otil_xdit.networks.unet.layers import is_spatial, unwrap_layer, wrap_layer
from otil_xdit.networks.unet.sharding import row_shares_of
from otil_xdit.networks.vae.downsampling import pads_below, patched_downsampling
from otil_xdit.networks.vae.levels import CoderLevels, Levels


class PatchedCoder:
    """One encoder or decoder whose layers reach the other ranks.

    Args:
        coder: diffusers' `Encoder` or `Decoder` of a VAE that ranks can share (`.support`); `prepare` wraps its layers.
        exchange: between all ranks that work on the image.
        is_active: tells whether all these ranks make the call under way, or are about to.
        announce: told of the input of each call that the ranks share, and of whether it is given `memory`.
        shares: of the rows, for each rank, in any unit; empty for equal ones.

    Attributes:
        levels_of: makes the resolutions of its layers from a coder.
        takes_arguments: whether calls may have arguments beside the map, which ranks that `follow` would not know.
        memory: the argument that takes what the call before has returned beside its map; empty where none does.
    """

    levels_of: Callable[[Any], Levels] = CoderLevels
    takes_arguments = False
    memory = ""

    def __init__(
        self,
        coder: Any,
        exchange: SynchronousExchange,
        is_active: Callable[[], bool],
        announce: Callable[[torch.Tensor, bool], None] = lambda x, continues: None,
        shares: tuple[int, ...] = (),
    ) -> None:
        self.coder, self.is_active, self._announce = coder, is_active, announce
        self.running = False
        self.order = make_order()
        self._exchange, self._levels, self._shares = exchange, type(self).levels_of(coder), shares
        self._grid: LevelGrid | None = None

    @staticmethod
    def derivation(module: nn.Module) -> Callable[[type], type] | None:
        """Return what makes a class on patches of a layer's; None for one that needs none, or that U-Nets have too."""
        return patched_downsampling if pads_below(module) else None

    @property
    def is_first(self) -> bool:
        """Tell whether this rank holds the image's uppermost rows."""
        return self._exchange.rank == 0

    @property
    def is_last(self) -> bool:
        """Tell whether this rank holds the image's lowest rows."""
        return self._exchange.rank == self._exchange.ranks - 1

    def prepare(self) -> None:
        """Wrap the coder and its layers.

        Raises:
            ValueError: naming the layer that patches cannot serve.
        """
        for path, module in self.coder.named_modules():
            context = LayerContext(self, path, self._levels.of(path))
            derive = _patched_coder if module is self.coder else self.derivation(module)
            if derive is not None:
                if not is_swapped(module):
                    swap_class(module, derive)
                vars(module)[CONTEXT] = context
            elif is_spatial(module):
                wrap_layer(module, context)

    def release(self) -> None:
        """Give the coder and its layers their own classes back."""
        for module in self.coder.modules():
            unwrap_layer(module)

    def forward(self, plain: Callable[[torch.Tensor], Any], x: torch.Tensor, continues: bool = False) -> Any:
        """Compute ``plain(x)`` on all ranks together; on each of them where they cannot share the rows of `x`.

        Args:
            plain: the coder's own `forward`.
            x: the whole image or latent, [B, C, H, W], the same on all ranks; of a clip [B, C, T, H, W].
            continues: whether the call is given what the one before has returned.

        Returns:
            The whole latent or image; before what else `plain` returns, which stays this rank's.
        """
        grid = self._grid_of(x)
        if grid is None:
            return plain(x)
        self._announce(x, continues)
        source, target = self._ends
        rows = grid.slice_of(source, self._exchange.rank)
        with self._running_on(grid):
            made = plain(x[..., rows, :].contiguous())
        part, *rest = made if isinstance(made, tuple) else (made,)
        whole = self._whole("the output", part, grid.rows[target], -2)
        return (whole, *rest) if rest else whole

    def _whole(self, what: str, part: torch.Tensor, rows: Sequence[int], dim: int) -> torch.Tensor:
        """Return the map of all ranks' rows from this rank's.

        Args:
            what: the map, for errors.
            part: with this rank's rows in the dimension `dim`, counted from the end.
            rows: every rank's number of them.
        """
        missing = max(rows) - part.shape[dim]  # collectives want equal sizes
        parts = self._exchange.gather(what, functional.pad(part, (0, 0) * (-dim - 1) + (0, missing)))
        return torch.cat([theirs.narrow(dim, 0, count) for theirs, count in zip(parts, rows, strict=True)], dim)

    def follow(self, calls: Iterable[tuple[torch.Tensor, bool]]) -> None:
        """Make the calls that another rank makes.

        Args:
            calls: the input of each, and whether it is given `memory`, as `announce` was told there.
        """
        kept = None
        for x, continues in calls:
            if self.memory:
                _, kept = self.coder(x, **{self.memory: kept if continues else None})
            else:
                self.coder(x)

    @property
    def _ends(self) -> tuple[int, int]:
        """Return the levels of what comes in and of what goes out."""
        coarsest = self._levels.count - 1
        return (0, coarsest) if self._levels.is_encoder else (coarsest, 0)

    @contextmanager
    def _running_on(self, grid: LevelGrid) -> Iterator[None]:
        """Bracket a pass of this rank's rows, in which layers reach the other ranks."""
        self._grid, self.running = grid, True
        try:
            yield
        finally:
            self._grid, self.running = None, False

    # ---- what layers ask for: see `LayerExchange` ------------------------------------------------------------------

    def prefetched_halo(self, context: LayerContext, x: torch.Tensor, above: int, below: int) -> HaloRows | None:
        return None

    def halo(
        self, context: LayerContext, x: torch.Tensor, above: int, below: int, precomputed: HaloRows | None
    ) -> torch.Tensor:
        return self._exchange.halo(context.name, x, above, below)

    def room_for(self, context: LayerContext, x: torch.Tensor) -> torch.Tensor | None:
        return None

    def moments(
        self, context: LayerContext, mean: torch.Tensor, var: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        share = row_shares_of(self._current_grid(), context.level, mean.device)
        return self._exchange.moments(context.name, mean, var, share)

    def norm_halo(
        self, context: LayerContext, mean: torch.Tensor, var: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, HaloRows | None]:
        return *self.moments(context, mean, var), None

    def prefetch_halo(self, context: LayerContext, x: torch.Tensor, rows: HaloRows) -> None:
        raise AssertionError("norm_halo gives no rows")

    def attend(
        self, context: LayerContext, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attend from this rank's tokens to those of all ranks, of a clip to those of the same frame and before.

        Frame by frame, as a mask would have as many numbers as there are pairs of tokens.
        """
        grid, level = self._current_grid(), context.level
        rows = grid.rows[level]
        own = torch.stack([key, value]).unflatten(3, (-1, rows[self._exchange.rank], grid.widths[level]))
        keys, values = self._whole(f"layer {context.name}", own, rows, -3).flatten(4, 5)  # [B, heads, T, H * W, d]
        out = [
            functional.scaled_dot_product_attention(
                frame, keys[:, :, :seen].flatten(2, 3), values[:, :, :seen].flatten(2, 3)
            )
            for seen, frame in enumerate(query.unflatten(2, (keys.shape[2], -1)).unbind(2), start=1)
        ]
        return torch.cat(out, dim=2)

    def _current_grid(self) -> LevelGrid:
        assert self._grid is not None, "layers ask for other ranks' part during a patched pass only"
        return self._grid

    def _grid_of(self, x: torch.Tensor) -> LevelGrid | None:
        """Return how the ranks share a map; None where they cannot, as it has too few rows or halves unevenly."""
        scale, height, width = 2 ** (self._levels.count - 1), *x.shape[-2:]
        if not self._levels.is_encoder:
            height, width = height * scale, width * scale
        if height % scale or width % scale or height // scale < self._exchange.ranks or torch.is_grad_enabled():
            return None
        return LevelGrid.build(height, width, self._levels.count, self._exchange.ranks, self._shares)


def attend_places(context: LayerContext, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Do what `PatchedCoder.attend` does, in one head, with maps of rows: [B, C, h, W], or [B, C, T, h, W]."""
    tokens = (one.flatten(2).transpose(1, 2).unsqueeze(1) for one in (query, key, value))
    out = context.exchange.attend(context, *tokens)
    return out.squeeze(1).transpose(1, 2).unflatten(2, query.shape[2:])


@cache
def _patched_coder(kind: Any) -> type:
    @wraps(kind.forward)
    def forward(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        coder: PatchedCoder = self._otil_context.exchange
        is_known = coder.takes_arguments or not (args or kwargs.keys() - {coder.memory})
        if not coder.is_active() or not is_known:
            return kind.forward(self, sample, *args, **kwargs)
        continues = kwargs.get(coder.memory) is not None
        return coder.forward(lambda part: kind.forward(self, part, *args, **kwargs), sample, continues)

    return subclass_of(kind, {"forward": forward, CONTEXT: None})
