"""A group norm on patches: it normalises by the moments of the whole map.

Where a convolution reads its output, the norm fetches the neighbours' rows of its input together with the moments and
normalises them too, so that the convolution need not wait for another message (`otil_xdit.networks.unet.norm_conv`).

Shapes: B batch, C channels, h rows of this rank, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from otil_xdit.exchange.halo import HaloRows
from otil_xdit.method.kernels import is_fused
from otil_xdit.method.memory_format import is_channels_last
from otil_xdit.networks.class_swap import subclass_of
from otil_xdit.networks.handles import define_operator, owner_of
from otil_xdit.networks.unet.context import CONTEXT, Affine, LayerContext, check_forward, handle_of, running_context
from otil_xdit.networks.unet.norm_conv import give_activated
from otil_xdit.networks.unet.text_cache import tensor_state

Normalise = Callable[[torch.Tensor], torch.Tensor]
"""Normalises any rows of a map, [B, C, rows, W], by moments that are known."""

AT_ONCE = 2**24
"""Numbers whose moments are taken at once: more than a map of a U-Net has at 1024 x 1024 pixels on two patches."""


def check_group_norm(norm: nn.GroupNorm, name: str) -> None:
    """Validate that a group norm computes what `nn.GroupNorm` computes.

    Raises:
        ValueError: naming the layer.
    """
    check_forward(norm, nn.GroupNorm, name)


@cache
def patched_group_norm(kind: type) -> type:
    """Derive from `kind`, `nn.GroupNorm` or a subclass that computes the same, the class of a group norm on patches."""

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        context = running_context(self)
        if context is None:
            return kind.forward(self, input)  # type: ignore[attr-defined]  # see check_group_norm
        mean, var = moments_of(input, self.num_groups)
        if torch.compiler.is_compiling():
            handle = handle_of(context)
            mean, var = _moments_operator(handle.number, handle.order, mean, var, input)
            return _normaliser(self, context, mean, var)(input)
        halo = None
        if context.pair is None:
            mean, var = context.exchange.moments(context, mean, var)
        else:
            mean, var, halo = context.exchange.norm_halo(context, mean, var, input)
        normalise = _normaliser(self, context, mean, var)
        if halo is not None:
            _prefetch(context, input, halo, normalise)
        room = None if context.pair is None else context.exchange.room_for(context, input)
        if room is None or context.pair is None or (self.weight is None) != (self.bias is None):
            return normalise(input)
        from otil_xdit.method.kernels.group_norm import activate_into

        activate_into(input, mean, var, self.weight, self.bias, self.eps, room)
        return give_activated(context.pair.activation, room)

    return subclass_of(kind, {"forward": forward, CONTEXT: None})


def moments_of(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and biased variance of [B, C, h, W], float32 [B, groups].

    In two passes: torch.var_mean takes 0.85 ms in place of 0.04 ms for 2 x 8 groups of 10240 on one core of a CPU.
    """
    if is_fused(x):
        from otil_xdit.method.kernels.group_norm import group_moments

        mean, var = group_moments(x, groups)
        return mean, var
    values = x.reshape(x.shape[0], groups, -1)
    if x.numel() <= AT_ONCE:
        return _moments_of_groups(values)
    # A VAE's maps are hundreds of megabytes, and the float32 copies would be the most that it ever holds.
    parts = values.split(max(1, AT_ONCE * groups // x.numel()), dim=1)
    means, variances = zip(*map(_moments_of_groups, parts), strict=True)
    return torch.cat(means, 1), torch.cat(variances, 1)


def _moments_of_groups(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and biased variance over the last dimension of [B, groups, n], float32."""
    values = values.float()
    mean = values.mean(2, keepdim=True)
    return mean.squeeze(2), (values - mean).square_().mean(2)


def _normaliser(norm: nn.GroupNorm, context: LayerContext, mean: torch.Tensor, var: torch.Tensor) -> Normalise:
    """Return the function that `norm` is of a map with these moments, float32 [B, groups].

    A batch norm over B * C channels in inference mode: one operator, which computes in float32 (or float64).
    """
    if is_fused(mean) and (norm.weight is None) == (norm.bias is None):
        from otil_xdit.method.kernels import group_norm as kernels

        return lambda x: kernels.normalise(x, mean, var, norm.weight, norm.bias, norm.eps)
    batch, groups = mean.shape
    per_channel = batch, groups, norm.num_channels // groups
    means, variances = (one[..., None].expand(per_channel).reshape(-1) for one in (mean, var))

    def normalise(x: torch.Tensor) -> torch.Tensor:
        kind = torch.promote_types(x.dtype, torch.float32)
        affine = _affine(norm, context, batch, kind)
        moments = means.to(kind), variances.to(kind)

        def apply(part: torch.Tensor, at: slice) -> torch.Tensor:
            weight, bias = (None if one is None else one[at] for one in (affine.weight, affine.bias))
            return functional.batch_norm(part, moments[0][at], moments[1][at], weight, bias, eps=norm.eps)

        if len(x) > 1 and is_channels_last(x):
            # Images cannot be joined to B * C channels without a copy into the other memory format.
            size = norm.num_channels
            return torch.cat([apply(x[n : n + 1], slice(n * size, (n + 1) * size)) for n in range(len(x))])
        return apply(x.reshape(1, -1, *x.shape[2:]), slice(None)).view(x.shape)

    return normalise


def _affine(norm: nn.GroupNorm, context: LayerContext, batch: int, kind: torch.dtype) -> Affine:
    """Return a norm's weights for so many images, in that type; made once, as they seldom change."""

    def made(one: torch.Tensor | None) -> torch.Tensor | None:
        return None if one is None else one.expand(batch, -1).reshape(-1).to(kind)

    if torch.compiler.is_compiling():
        return Affine((), made(norm.weight), made(norm.bias))
    state = (None if one is None else tensor_state(one) for one in (norm.weight, norm.bias))
    key = (batch, kind, *state)
    if context.affine is None or context.affine.key != key:
        context.affine = Affine(key, made(norm.weight), made(norm.bias))
    return context.affine


def _prefetch(context: LayerContext, x: torch.Tensor, halo: HaloRows, normalise: Normalise) -> None:
    """Make the neighbours' rows of the norm's input into those that its convolution is to read.

    Args:
        context: the norm's.
        x: the norm's input, [B, C, h, W].
        halo: rows above and below it; None beyond the image's edge, where the convolution reads zeros.
        normalise: the norm's own function.
    """
    assert context.pair is not None, "only a norm with a pair is given rows"
    activation = context.pair.activation
    above, below = (None if rows is None else activation(normalise(rows)) for rows in halo)
    context.exchange.prefetch_halo(context, x, (above, below))


def _compute(
    number: torch.Tensor, order: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance of the whole map; the neighbours' rows for the norm's pair are kept beside the graph."""
    context: LayerContext = owner_of(number)
    if context.pair is None:
        return context.exchange.moments(context, mean, var)
    whole_mean, whole_var, halo = context.exchange.norm_halo(context, mean, var, x)
    if halo is not None:
        _prefetch(context, x, halo, _normaliser(context.pair.norm, context, whole_mean, whole_var))
    return whole_mean, whole_var


def _like(
    number: torch.Tensor, order: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return mean.new_empty(mean.shape), var.new_empty(var.shape)


_moments_operator = define_operator("moments", "Tensor mean, Tensor var, Tensor x", "(Tensor, Tensor)", _compute, _like)
"""What a norm asks the other ranks for, in a compiled graph."""
