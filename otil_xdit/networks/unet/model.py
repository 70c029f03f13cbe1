"""`PatchedUNet`: a whole `UNet2DConditionModel` on patches.

The pipeline calls the U-Net with the whole latent on every rank and gets the whole noise prediction on every rank. In
between each rank runs the network on its rows, and on its half of the batch where CFG parallelism is on.

Shapes: B batch, C channels, H x W the latent, h rows of this rank, S tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, lru_cache, wraps
from inspect import signature
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput
from torch.nn import functional

from otil_xdit.comm.groups import UnetGroups
from otil_xdit.exchange.halo import HaloRows, halo_key
from otil_xdit.method.grid import LevelGrid, TokenLayout, kept_tokens
from otil_xdit.networks.class_swap import is_swapped, subclass_of, swap_class
from otil_xdit.networks.compatibility import check_no_gradients
from otil_xdit.networks.unet.layers import LayerContext, halo_rows, is_spatial, unwrap_layer, wrap_layer
from otil_xdit.networks.unet.levels import Levels, check_supported
from otil_xdit.networks.unet.norm_conv import PrefetchedHalo, find_pairs
from otil_xdit.networks.unet.text_cache import TextCache

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention over the Ulysses group and the patches: queries, keys and values [B, heads, S, d] to [B, heads, S, d]."""

_PASSED_KWARGS = ("scale",)
"""Entries of `cross_attention_kwargs` that mean the same on a patch: the weight of LoRA."""


class PassProtocol(Protocol):
    """Which of guidance's two passes this rank computes; `otil_xdit.hybridiff.controller.CfgController` documents
    each method."""

    def is_staged(self, network: Any) -> bool: ...
    def call(self, network: Any, call: Callable[[Any], Any], inputs: Any) -> Any: ...
    def predicted(self, whole: torch.Tensor) -> torch.Tensor: ...


class SessionProtocol(Protocol):
    """The pipeline's session, as far as a U-Net needs it; `otil_xdit.runtime.session.PatchSession` documents each."""

    communicator: Any
    cfg_controller: PassProtocol

    @property
    def is_active(self) -> bool: ...
    def attention(
        self, name: str, layout: TokenLayout, kept_keys: torch.Tensor | None
    ) -> AbstractContextManager[None]: ...


def is_unet(network: Any) -> bool:
    """Whether `PatchedUNet` is what a network needs; which U-Nets it can serve is another question."""
    return isinstance(network, UNet2DConditionModel)


class PatchedUNet:
    """One U-Net's layers and their way to the other ranks.

    Args:
        session: the pipeline's.
        network: a diffusers `UNet2DConditionModel`; its layers are wrapped by `prepare`.
        groups: who shares it.
        attend: attention across the ranks.

    Raises:
        ValueError: naming what of the network patches cannot serve.
    """

    def __init__(self, session: SessionProtocol, network: Any, groups: UnetGroups, attend: Attend) -> None:
        check_supported(network)
        self.session, self.network, self.groups = session, network, groups
        self.running = False
        self.text = TextCache()
        self._attend = attend
        self._levels = Levels(network)
        self._grid: LevelGrid | None = None
        self._step, self._calls = -1, 0
        self._rows: PrefetchedHalo | None = None

    @property
    def is_last(self) -> bool:
        """Whether this rank holds the image's lowest rows."""
        return self.groups.rows.rank == self.groups.rows.world_size - 1

    def prepare(self) -> None:
        """Wrap the network and its layers, those too that are new since the last time (LoRA); forget the text.

        Raises:
            ValueError: naming the layer that patches cannot serve, or the setting that means nothing at its resolution.
        """
        if not is_swapped(self.network):
            swap_class(self.network, _patched_unet)
        vars(self.network)["_otil_seat"] = LayerContext(self, "", 0)
        _check_freeu(self.network)
        pairs, levels = find_pairs(self.network), set[int]()
        for path, module in self.network.named_modules():
            if is_spatial(module):
                level = self._levels.of(path)
                wrap_layer(module, self, path, level, pairs.get(path))
                self._check_heads(path, module)
                if isinstance(module, Attention) and not module.is_cross_attention:
                    levels.add(level)
        patches = self.groups.rows.world_size // self.groups.ulysses_degree
        for level in levels if patches > 1 else ():
            self.session.communicator.observe(None, TokenLayout(pixels=2**level))
        self.text.clear()
        self._step = -1

    def release(self) -> None:
        """Give the network its own layers back."""
        for module in self.network.modules():
            unwrap_layer(module)
        self.text.clear()

    def _check_heads(self, path: str, module: Any) -> None:
        degree = self.groups.ulysses_degree
        heads = getattr(module, "heads", degree)
        if heads % degree and not module.is_cross_attention:
            raise ValueError(
                f"--ulysses_degree {degree} cannot share out the {heads} attention heads of the U-Net's layer {path}; "
                "give a degree that divides them, or more patches instead"
            )

    # ---- what layers ask for -------------------------------------------------------------------------------------

    @torch.compiler.disable
    def halo(self, seat: LayerContext, x: torch.Tensor, above: int, below: int) -> torch.Tensor:
        """`x`, [B, C, h, W], with the neighbours' rows above and below it.

        Raises:
            ValueError: on every rank, when a rank has fewer rows than another needs of it.
        """
        self._check_rows(seat.name, seat.level, above, below)
        kept, self._rows = self._rows, None
        given = None if kept is None else kept.take(seat.name, x, above, below)
        if kept is None or given is None:
            return self.session.communicator.halo(self._name(seat.name), x, above, below)
        self._rows = None if kept.is_used_up else kept
        return self.session.communicator.halo(self._name(seat.name), x, above, below, given)

    @torch.compiler.disable
    def moments(self, seat: LayerContext, mean: torch.Tensor, var: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Moments, float32 [B, groups], of whole maps from those of this rank's rows."""
        self._rows = None
        return self.session.communicator.moments(self._name(seat.name), mean, var, self._share(seat, mean.device))

    @torch.compiler.disable
    def norm_halo(
        self, seat: LayerContext, mean: torch.Tensor, var: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, HaloRows | None]:
        """`moments`, and the rows of the norm's input `x`, [B, C, h, W], that its convolution needs of the neighbours.

        The rows are None where the settings or the pair's modules do not let the two travel together; the convolution
        then asks by itself.

        Raises:
            ValueError: as `halo`.
        """
        assert seat.pair is not None, "only a norm with a pair asks for rows"
        if not seat.pair.holds():
            return *self.moments(seat, mean, var), None
        above, below = halo_rows(seat.pair.conv)
        self._check_rows(seat.pair.name, seat.level, above, below)
        names = self._name(seat.name), self._name(seat.pair.conv_name)
        share = self._share(seat, mean.device)
        found = self.session.communicator.norm_halo(names, mean, var, share, x, above, below)
        return (*self.moments(seat, mean, var), None) if found is None else found

    def keep_rows(self, seat: LayerContext, x: torch.Tensor, rows: HaloRows) -> None:
        """Have `rows` ready for the convolution of a norm's pair, whose call is the next that asks for any.

        Args:
            seat: the norm's.
            x: the norm's input, [B, C, h, W].
            rows: above and below, None beyond the image's edge.
        """
        assert seat.pair is not None, "only a norm with a pair has rows for it"
        self._rows = PrefetchedHalo(seat.pair, rows, halo_key(x, *halo_rows(seat.pair.conv)))

    @torch.compiler.disable
    def attend(self, seat: LayerContext, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of this rank's tokens to everybody's; all [B, heads, S, d].

        Ranks with fewer rows than others pad theirs, as collectives want equal sizes; the padding is taken out again
        before keys are attended to.
        """
        self._rows = None
        grid, level = self._current_grid(), seat.level
        rows, cols = grid.rows[level], grid.widths[level]
        tokens, most = query.shape[2], max(rows) * cols
        layout = TokenLayout(max(rows), cols, 2**level, chunks=self.groups.ulysses_degree)
        kept = None if grid.is_even(level) else _kept(tuple(count * cols for count in rows), most, query.device)
        padding = (0, 0, 0, most - tokens)
        if most > tokens:
            query, key, value = (functional.pad(part, padding) for part in (query, key, value))
        with self.session.attention(self._name(seat.name), layout, kept):
            return self._attend(query, key, value)[:, :, :tokens]

    # ---- the whole pass ------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether the pipeline that this belongs to is generating."""
        return self.session.is_active

    def forward(self, plain: Callable[..., Any], sample: torch.Tensor, **kwargs: Any) -> Any:
        """What the network's own `forward` gives for the whole latent, [B, C, H, W], computed by all ranks.

        Args:
            plain: the network's own `forward`.
            sample, kwargs: what the network is called with.

        Raises:
            ValueError: for arguments that patches cannot serve, and sizes that the ranks cannot share.
        """
        _check_arguments(kwargs)
        check_no_gradients(self.network, sample, *kwargs.values())
        return_dict = kwargs.pop("return_dict", True)
        # In two stages both segments are of the pass with the prompt, which the last CFG group computes.
        is_staged = self.session.cfg_controller.is_staged(self.network)
        cut = self._cut(sample, self.groups.cfg_degree - 1 if is_staged else self.groups.cfg_rank)
        self._count_call()
        latent = cut.rows(cut.batch(sample))
        layout = TokenLayout(max(cut.grid.rows[0]), cut.grid.widths[0], chunks=self.groups.ulysses_degree)
        self.session.communicator.observe(latent, layout)
        # CFG parallelism alone cuts no rows: the layers have everything they need.
        self._grid, self.running = cut.grid, self.groups.rows.world_size > 1
        try:
            arguments = {name: cut.argument(name, value) for name, value in kwargs.items()}
            inputs = {"latent": latent, **arguments}
            (part,) = self.session.cfg_controller.call(self.network, lambda given: plain(**given), inputs)
        finally:
            self._grid, self._rows, self.running = None, None, False
        whole = self.session.cfg_controller.predicted(self._whole(part, sample, cut))
        return UNet2DConditionOutput(sample=whole) if return_dict else (whole,)

    def _cut(self, sample: torch.Tensor, cfg_rank: int) -> _Cut:
        batch, _, height, width = sample.shape
        grid = _grid(height, width, self._levels.count, self.groups.rows.world_size)
        # Images of a batch do not see each other, so any split is right, not only that into the two CFG passes. An
        # odd batch (one image without guidance) is computed by all CFG groups alike.
        size = batch // self.groups.cfg_degree if batch % self.groups.cfg_degree == 0 else batch
        start = cfg_rank * size if size < batch else 0
        return _Cut(grid, self.groups.rows.rank, batch, slice(start, start + size))

    def _whole(self, part: torch.Tensor, sample: torch.Tensor, cut: _Cut) -> torch.Tensor:
        """The whole prediction, [B, C, H, W], from every rank's [b, C, h, W]: one collective."""
        rows = cut.grid.rows[0]
        padded = functional.pad(part, (0, 0, 0, max(rows) - part.shape[2])).contiguous()
        gathered = self.session.communicator.collect(padded)
        whole = part.new_empty(sample.shape[0], *part.shape[1:2], *sample.shape[2:])
        size = part.shape[0]
        for (cfg_rank, place), theirs in zip(self.groups.places, gathered, strict=True):
            if size == sample.shape[0] and cfg_rank > 0:
                continue
            images = slice(cfg_rank * size, (cfg_rank + 1) * size)
            whole[images, :, cut.grid.slice_of(0, place)] = theirs[:, :, : rows[place]]
        return whole

    def _count_call(self) -> None:
        """A second call within a step has buffers of its own."""
        step = self.session.communicator.clock.step
        self._calls = self._calls + 1 if step == self._step else 0
        self._step = step

    def _name(self, layer: str) -> str:
        return f"unet/{layer}#{self._calls}"

    def _share(self, seat: LayerContext, device: torch.device) -> torch.Tensor:
        return _share(self._current_grid().rows[seat.level], device)

    def _check_rows(self, layer: str, level: int, above: int, below: int) -> None:
        least = min(self._current_grid().rows[level])
        if max(above, below) > least:
            raise ValueError(
                f"the layer {layer} needs {max(above, below)} rows of its neighbours, and a rank has {least} there; "
                "give a larger height or fewer ranks"
            )

    def _current_grid(self) -> LevelGrid:
        assert self._grid is not None, "layers ask for other ranks' part during a patched pass only"
        return self._grid


@dataclass(frozen=True)
class _Cut:
    """This rank's part of one call: which images, which rows."""

    grid: LevelGrid
    rank: int
    whole_batch: int
    images: slice

    def batch(self, value: torch.Tensor) -> torch.Tensor:
        """This rank's images of a tensor that has one entry for each; others stay whole."""
        return value[self.images] if value.ndim > 0 and value.shape[0] == self.whole_batch else value

    def rows(self, value: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a map of any level, [B, C, rows, cols]."""
        level = self.grid.level_of(*value.shape[-2:])
        return value[..., self.grid.slice_of(level, self.rank), :].contiguous()

    def argument(self, name: str, value: Any) -> Any:
        """This rank's part of a named argument of the U-Net."""
        if name in ("down_block_additional_residuals", "down_intrablock_additional_residuals"):
            # A new list: the network takes its entries out one by one.
            return None if value is None else [self.rows(self.batch(one)) for one in value]
        if name == "mid_block_additional_residual":
            return None if value is None else self.rows(self.batch(value))
        return self._images_of(value)

    def _images_of(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.batch(value)
        if isinstance(value, dict):
            return {key: self._images_of(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._images_of(one) for one in value)
        return value


@lru_cache(maxsize=64)
def _grid(height: int, width: int, levels: int, ranks: int) -> LevelGrid:
    return LevelGrid.build(height, width, levels, ranks)


@lru_cache(maxsize=64)
def _kept(counts: tuple[int, ...], chunk: int, device: torch.device) -> torch.Tensor:
    return kept_tokens(counts, chunk).to(device)


@lru_cache(maxsize=64)
def _share(rows: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32, device=device) / sum(rows)


@cache
def _patched_unet(kind: Any) -> type:
    call = signature(kind.forward)

    @wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        patches: PatchedUNet = self._otil_seat.patches
        if not patches.active:
            return kind.forward(self, *args, **kwargs)

        def plain(latent: torch.Tensor, **arguments: Any) -> Any:
            return kind.forward(self, latent, **arguments, return_dict=False)

        arguments = call.bind(self, *args, **kwargs).arguments
        del arguments[next(iter(call.parameters))]
        return patches.forward(plain, **arguments)

    return subclass_of(kind, {"forward": forward})


def _check_arguments(kwargs: dict[str, Any]) -> None:
    if kwargs.get("attention_mask") is not None:
        raise ValueError("--parallel does not support attention_mask of a U-Net: it describes whole maps")
    unknown = set(kwargs.get("cross_attention_kwargs") or {}) - set(_PASSED_KWARGS)
    if unknown:
        raise ValueError(
            f"--parallel does not support {', '.join(sorted(unknown))} in cross_attention_kwargs; it knows "
            f"{', '.join(_PASSED_KWARGS)}"
        )


def _check_freeu(network: Any) -> None:
    if any(getattr(block, name, None) is not None for block in network.up_blocks for name in ("s1", "s2", "b1", "b2")):
        raise ValueError("--parallel does not support FreeU, which filters whole maps; call disable_freeu()")
