"""The layers of a U-Net that look beyond a patch: convolutions, group norms, attention.

Each is the layer itself with another `forward` (`otil_xdit.networks.class_swap`), so parameters, their names, hooks and
`isinstance` stay. Outside a patched pass they do what they always did.

Shapes: B batch, C channels, h rows of this rank, W columns, S tokens of this rank, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional

from otil_xdit.exchange.halo import HaloRows
from otil_xdit.networks.class_swap import is_swapped, restore_class, subclass_of, swap_class
from otil_xdit.networks.unet.norm_conv import NormConvPair
from otil_xdit.networks.unet.text_cache import TextCache

_SEAT = "_otil_seat"
"""Where a wrapped layer keeps its `LayerContext`. The subclasses have None there: peft makes the layers of an adapter
of the class of the layer that it adapts, without telling anybody."""

PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")
"""Attention processors of diffusers that compute plain attention, whatever they compute it with."""

TEXT_PROCESSORS = (
    *PLAIN_PROCESSORS,
    "IPAdapterAttnProcessor",
    "IPAdapterAttnProcessor2_0",
    "IPAdapterXFormersAttnProcessor",
)
"""Processors that may attend to text: every query by itself, so patches change nothing."""


class Patches(Protocol):
    """Whom layers ask for the other ranks' part; `otil_xdit.networks.unet.model.PatchedUNet` documents each."""

    text: TextCache

    @property
    def running(self) -> bool: ...
    @property
    def is_last(self) -> bool: ...
    def halo(self, seat: LayerContext, x: torch.Tensor, above: int, below: int) -> torch.Tensor: ...
    def moments(
        self, seat: LayerContext, mean: torch.Tensor, var: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    def norm_halo(
        self, seat: LayerContext, mean: torch.Tensor, var: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, HaloRows | None]: ...
    def keep_rows(self, seat: LayerContext, x: torch.Tensor, rows: HaloRows) -> None: ...
    def attend(
        self, seat: LayerContext, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor: ...


@dataclass
class LayerContext:
    """A layer's place: whom it asks, its name in the U-Net, its level; of a norm, the convolution that reads it."""

    patches: Patches
    name: str
    level: int
    pair: NormConvPair | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerContext:
        # A copied network may be wrapped anew; process groups cannot be copied.
        return self


def is_spatial(module: nn.Module) -> bool:
    """Whether a patch of the module's input is not enough for the same patch of its output."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size[0] > 1
    return isinstance(module, (nn.GroupNorm, Attention))


def wrap_layer(module: nn.Module, patches: Patches, name: str, level: int, pair: NormConvPair | None = None) -> None:
    """Let a spatial layer work on patches; wrapping it again gives it another seat.

    Args:
        module: the layer.
        patches, name, level, pair: see `LayerContext`.

    Raises:
        ValueError: naming the layer and what of it patches cannot serve.
    """
    if not is_swapped(module):
        if isinstance(module, nn.Conv2d):
            _check_conv(module, name)
            swap_class(module, _patched_conv)
        elif isinstance(module, nn.GroupNorm):
            _check_forward(module, nn.GroupNorm, name)
            swap_class(module, _patched_norm)
        else:
            swap_class(module, _patched_attention)
    if isinstance(module, Attention):
        _check_processor(module, name)
    vars(module)[_SEAT] = LayerContext(patches, name, level, pair)


def unwrap_layer(module: nn.Module) -> None:
    """Undo `wrap_layer`; nothing for a layer that is not wrapped."""
    vars(module).pop(_SEAT, None)
    if is_swapped(module):
        restore_class(module)


def is_wrapped(module: nn.Module) -> bool:
    return _SEAT in vars(module)


# ---- convolution ---------------------------------------------------------------------------------------------------


def halo_rows(conv: nn.Conv2d) -> tuple[int, int]:
    """Rows that a convolution needs above and below a patch which begins and ends at multiples of its stride.

    Output row j reads the input rows j * stride - padding + dilation * (0 .. kernel - 1).
    """
    (kernel, _), (stride, _), (dilation, _) = conv.kernel_size, conv.stride, conv.dilation
    padding = conv.padding[0]
    assert isinstance(padding, int), "string paddings are refused by _check_conv"
    return padding, max(dilation * (kernel - 1) + 1 - stride - padding, 0)


def _check_conv(conv: nn.Conv2d, name: str) -> None:
    _check_forward(conv, nn.Conv2d, name)
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(
            f"--parallel does not support the padding of the layer {name} ({conv.padding!r}, {conv.padding_mode}); "
            "it knows zeros, by number"
        )
    if conv.stride[0] not in (1, 2):
        raise ValueError(f"--parallel does not support the stride {conv.stride} of the layer {name}; it knows 1 and 2")


@cache
def _patched_conv(kind: type) -> type:
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        seat: LayerContext | None = self._otil_seat
        if seat is None or not seat.patches.running:
            return kind.forward(self, input)  # type: ignore[attr-defined]  # nn.Conv2d or a subclass, see _check_conv
        above, below = halo_rows(self)
        widened = seat.patches.halo(seat, input, above, below)
        if seat.patches.is_last and self.padding[0] > below:
            # The image's lower edge: zeros for as many rows as one device pads, not only as many as a patch reads.
            widened = functional.pad(widened, (0, 0, 0, self.padding[0] - below))
        columns = (0, self.padding[1])
        return functional.conv2d(widened, self.weight, self.bias, self.stride, columns, self.dilation, self.groups)

    return subclass_of(kind, {"forward": forward, _SEAT: None})


# ---- group normalisation -------------------------------------------------------------------------------------------


@cache
def _patched_norm(kind: type) -> type:
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        seat: LayerContext | None = self._otil_seat
        if seat is None or not seat.patches.running:
            return kind.forward(self, input)  # type: ignore[attr-defined]  # nn.GroupNorm, see _check_forward
        return _normalise(self, seat, input)

    return subclass_of(kind, {"forward": forward, _SEAT: None})


def _normalise(norm: nn.GroupNorm, seat: LayerContext, x: torch.Tensor) -> torch.Tensor:
    """Group normalisation of [B, C, h, W] by the moments of the whole map, taken in float32."""
    mean, var = _moments(x, norm.num_groups)
    beyond = None
    if seat.pair is None:
        mean, var = seat.patches.moments(seat, mean, var)
    else:
        mean, var, beyond = seat.patches.norm_halo(seat, mean, var, x)
    normalise = _affine(norm, mean, var)
    if beyond is not None:
        _keep_rows(seat, x, beyond, normalise)
    return normalise(x)


def _moments(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance, float32 [B, groups].

    In two passes: torch.var_mean takes 0.85 ms in place of 0.04 ms for 2 x 8 groups of 10240 on one core of a CPU.
    """
    values = x.reshape(x.shape[0], groups, -1).float()
    mean = values.mean(2, keepdim=True)
    return mean.squeeze(2), (values - mean).square_().mean(2)


def _affine(norm: nn.GroupNorm, mean: torch.Tensor, var: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `norm` does to a map with these moments, float32 [B, groups].

    A batch norm over B * C channels in inference mode: one operator, which computes in float32 (or float64).
    """
    per_group = norm.num_channels // norm.num_groups
    means, variances = (one.repeat_interleave(per_group, dim=1).flatten() for one in (mean, var))
    affine = (norm.weight, norm.bias)
    weight, bias = (None if one is None else one.expand(len(mean), -1).reshape(-1) for one in affine)

    def normalise(x: torch.Tensor) -> torch.Tensor:
        kind = torch.promote_types(x.dtype, torch.float32)
        scale, shift = (None if one is None else one.to(kind) for one in (weight, bias))
        channels = x.reshape(1, -1, *x.shape[2:])
        out = functional.batch_norm(channels, means.to(kind), variances.to(kind), scale, shift, eps=norm.eps)
        return out.view(x.shape)

    return normalise


@torch.compiler.disable
def _keep_rows(
    seat: LayerContext, x: torch.Tensor, beyond: HaloRows, normalise: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Make of the rows beyond `x` what the norm's convolution is to read; beyond the image's edge it stays nothing."""
    assert seat.pair is not None, "only a norm with a pair is given rows"
    activation = seat.pair.activation
    above, below = (None if rows is None else activation(normalise(rows)) for rows in beyond)
    seat.patches.keep_rows(seat, x, (above, below))


# ---- attention -----------------------------------------------------------------------------------------------------


def _check_processor(attention: Attention, name: str) -> None:
    processor = type(attention.processor)
    known = TEXT_PROCESSORS if attention.is_cross_attention else PLAIN_PROCESSORS
    if processor.__name__ not in known or not processor.__module__.startswith("diffusers."):
        raise ValueError(
            f"--parallel does not support the attention processor {processor.__module__}.{processor.__name__} of the "
            f"layer {name}; it knows diffusers' {', '.join(known)}"
        )


@cache
def _patched_attention(kind: type) -> type:
    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        seat: LayerContext | None = self._otil_seat
        if seat is not None and seat.patches.running:
            if encoder_hidden_states is None:
                return _attend_to_image(self, seat, hidden_states)
            if type(self.processor).__name__ in PLAIN_PROCESSORS:
                return _attend_to_text(self, seat, hidden_states, encoder_hidden_states, attention_mask)
        return kind.forward(  # type: ignore[attr-defined]  # diffusers' Attention or a subclass
            self, hidden_states, encoder_hidden_states, attention_mask, **kwargs
        )

    return subclass_of(kind, {"forward": forward, _SEAT: None})


def _attend_to_image(attention: Any, seat: LayerContext, x: torch.Tensor) -> torch.Tensor:
    """Self-attention of this rank's tokens, [B, S, D], to everybody's."""
    query, key, value = (_heads(attention, layer(x)) for layer in (attention.to_q, attention.to_k, attention.to_v))
    return _finish(attention, seat.patches.attend(seat, *_normed(attention, query, key), value), x)


def _attend_to_text(
    attention: Any, seat: LayerContext, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Cross-attention of this rank's tokens to the text, whose keys and values are kept from step to step."""

    def project() -> tuple[torch.Tensor, torch.Tensor]:
        states = attention.norm_encoder_hidden_states(text) if attention.norm_cross else text
        return _heads(attention, attention.to_k(states)), _heads(attention, attention.to_v(states))

    key, value = seat.patches.text.get(seat.name, text, (attention.to_k, attention.to_v), project)
    query, key = _normed(attention, _heads(attention, attention.to_q(x)), key)
    if mask is not None:
        mask = attention.prepare_attention_mask(mask, text.shape[1], x.shape[0])
        mask = mask.view(x.shape[0], attention.heads, -1, mask.shape[-1])
    return _finish(attention, functional.scaled_dot_product_attention(query, key, value, attn_mask=mask), x)


def _heads(attention: Any, x: torch.Tensor) -> torch.Tensor:
    """[B, S, heads * d] as [B, heads, S, d]."""
    return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def _normed(attention: Any, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    query = query if attention.norm_q is None else attention.norm_q(query)
    return query, key if attention.norm_k is None else attention.norm_k(key)


def _finish(attention: Any, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Heads [B, heads, S, d] back to [B, S, D], and what follows attention in diffusers."""
    out = attention.to_out[1](attention.to_out[0](out.transpose(1, 2).flatten(2).to(x.dtype)))
    return ((out + x) if attention.residual_connection else out) / attention.rescale_output_factor


def _check_forward(module: nn.Module, base: type, name: str) -> None:
    forward: Callable[..., Any] = type(module).forward
    if forward is not base.forward:  # type: ignore[attr-defined]  # base is a class of modules
        raise ValueError(
            f"--parallel does not support the layer {name}: {type(module).__name__} computes something else than "
            f"{base.__name__}"
        )
