"""What a wrapped layer knows of its place, and whom it asks for the other ranks' part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from otil_xdit.exchange.halo import HaloRows
from otil_xdit.networks.handles import Handle
from otil_xdit.networks.unet.norm_conv import NormConvPair
from otil_xdit.networks.unet.text_cache import TextCache

CONTEXT = "_otil_context"
"""Attribute of a wrapped layer that holds its `LayerContext`. The subclasses have None there: peft makes the layers of
an adapter of the class of the layer that it adapts, without telling anybody."""


class LayerExchange(Protocol):
    """What a layer may ask the network on patches for; `otil_xdit.networks.unet.model.PatchedUNet` is one.

    `context` is always that of the layer that asks. Shapes: B batch, C channels, h rows of this rank, W columns, S
    tokens of this rank, d features of a head.

    Attributes:
        order: of the handles of the network's layers; see `Handle`.
    """

    order: torch.Tensor

    @property
    def running(self) -> bool:
        """Tell whether a pass on patches is under way, so that layers need the other ranks."""
        ...

    @property
    def is_last(self) -> bool:
        """Tell whether this rank holds the image's lowest rows."""
        ...

    def prefetched_halo(self, context: LayerContext, x: torch.Tensor, above: int, below: int) -> HaloRows | None:
        """Return the rows for a convolution of `x`, [B, C, h, W], if `prefetch_halo` was given them; None otherwise."""
        ...

    def halo(
        self, context: LayerContext, x: torch.Tensor, above: int, below: int, precomputed: HaloRows | None
    ) -> torch.Tensor:
        """Return a map with the neighbours' rows above and below it, and zeros beyond the image's edge.

        Args:
            context: the convolution's.
            x: this rank's map, [B, C, h, W].
            above, below: numbers of rows.
            precomputed: the rows, where they are known already; nothing is sent for them then.

        Returns:
            [B, C, above + h + below, W].

        Raises:
            ValueError: on every rank, when a rank has fewer rows than another needs of it.
        """
        ...

    def room_for(self, context: LayerContext, x: torch.Tensor) -> torch.Tensor | None:
        """Return where the activated output of a norm may be written, so that its convolution need not copy it.

        Args:
            context: the norm's.
            x: its input, [B, C, h, W].

        Returns:
            [B, C, h, W]; None where something else than the pair's convolution may read it, or kernels cannot write it.
        """
        ...

    def moments(
        self, context: LayerContext, mean: torch.Tensor, var: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and variance of the whole map from those of this rank's rows; all float32 [B, groups]."""
        ...

    def norm_halo(
        self, context: LayerContext, mean: torch.Tensor, var: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, HaloRows | None]:
        """Return `moments`, and the neighbours' rows of the norm's input that its convolution needs.

        Args:
            context: of a norm with a pair.
            mean, var: of this rank's rows, float32 [B, groups].
            x: the norm's input, [B, C, h, W].

        Returns:
            Mean and variance of the whole map, and the rows above and below `x`. The rows are None where the settings
            or the pair's modules do not let the two travel together; the convolution then asks by itself.

        Raises:
            ValueError: as `halo`.
        """
        ...

    def prefetch_halo(self, context: LayerContext, x: torch.Tensor, rows: HaloRows) -> None:
        """Keep rows for the convolution of a norm's pair, whose call is the next that asks for any.

        Args:
            context: the norm's.
            x: the norm's input, [B, C, h, W].
            rows: above and below, as the convolution is to read them; None beyond the image's edge.
        """
        ...

    def attend(
        self, context: LayerContext, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attend from this rank's tokens to those of all ranks.

        Ranks with fewer rows than others pad theirs, as collectives want equal sizes; the padding is taken out again
        before keys are attended to.

        Args:
            context: the attention layer's.
            query, key, value: of this rank's tokens, [B, heads, S, d].

        Returns:
            [B, heads, S, d].
        """
        ...


@dataclass(frozen=True)
class Affine:
    """A group norm's weight and bias for every image of a batch, [B * C], in the type that it computes in.

    Attributes:
        key: what they follow from.
    """

    key: tuple[Any, ...]
    weight: torch.Tensor | None
    bias: torch.Tensor | None


@dataclass
class LayerContext:
    """Place of one layer in a network on patches.

    Attributes:
        exchange: reaches the other ranks.
        name: of the layer in the network.
        level: resolution that it works at; 0 is the finest, in a U-Net the latent's.
        pair: of a group norm, the convolution that reads its output; None where no convolution does.
        text_cache: of the text's keys and values; None in a network without cross-attention.
        affine: of a group norm, its weights as they were needed last; None where they were not yet.
        handle: names the layer in a compiled graph; None until `wrap_layer` has been given it.
    """

    exchange: LayerExchange
    name: str
    level: int
    pair: NormConvPair | None = None
    text_cache: TextCache | None = None
    affine: Affine | None = None
    handle: Handle | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerContext:
        # A copied network may be wrapped anew; process groups cannot be copied.
        return self


def running_context(layer: Any) -> LayerContext | None:
    """Return the context of a wrapped layer during a patched pass, and None outside one."""
    context: LayerContext | None = layer._otil_context
    return context if context is not None and context.exchange.running else None


def handle_of(context: LayerContext) -> Handle:
    """Return the handle of a wrapped layer."""
    assert context.handle is not None, "wrap_layer gives every layer one"
    return context.handle


def check_forward(module: nn.Module, base: type, name: str) -> None:
    """Validate that a layer computes what its base class computes.

    Args:
        module: the layer.
        base: class whose `forward` is known.
        name: of the layer in the U-Net.

    Raises:
        ValueError: naming the layer, where a subclass has a `forward` of its own.
    """
    forward: Callable[..., Any] = type(module).forward
    if forward is not base.forward:  # type: ignore[attr-defined]  # base is a class of modules
        raise ValueError(
            f"--parallel does not support the layer {name}: {type(module).__name__} computes something else than "
            f"{base.__name__}"
        )
