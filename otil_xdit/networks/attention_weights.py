"""The weights round the self-attention of a network, where they are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from otil_xdit.method.coordinates import AttentionWeights

_UNTURNED = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "XFormersAttnProcessor",
    "SlicedAttnProcessor",
    "JointAttnProcessor2_0",
)
"""Processors, xDiT's too, that turn no queries and keys by their tokens' positions. All others may."""


def attention_weights(network: nn.Module) -> dict[str, AttentionWeights]:
    """Return the weights of a network's self-attention by the path of its module; none of layers that are not known.

    Known are diffusers' ``Attention`` and what has layers of the same names, as they are or in a wrapper of xDiT's.
    """
    readers = {id(attention): reader for attention, reader in _single_blocks(network)}
    known: dict[int, AttentionWeights | None] = {}
    found = {}
    for path, module in network.named_modules():
        attention = module._modules.get("module") or module  # xDiT wraps some
        if not all(hasattr(attention, name) for name in ("processor", "to_q", "to_k", "to_v", "heads")):
            continue
        if id(attention) not in known:
            known[id(attention)] = _weights_of(attention, readers.get(id(attention)))
        weights = known[id(attention)]
        if weights is not None and not getattr(attention, "is_cross_attention", False):
            found[path] = weights
    return found


def _single_blocks(network: nn.Module) -> list[tuple[Any, Any]]:
    """Return attention modules without a projection of their own, and what reads them: Flux's single blocks."""
    return [
        (attention, block.proj_out)
        for block in network.modules()
        if getattr(attention := getattr(block, "attn", None), "pre_only", False) and hasattr(block, "proj_out")
    ]


def _weights_of(attention: Any, reader: Any) -> AttentionWeights | None:
    """Return the weights of an attention module, read by `reader` or its own projection; None if they do not fit."""
    own = getattr(attention, "to_out", None)
    reader = own[0] if reader is None and own is not None else reader
    layers = [getattr(attention, name, None) for name in ("to_q", "to_k", "to_v")]
    matrices = [_matrix(layer) for layer in (*layers, reader)]
    norms = [getattr(getattr(attention, name, None), "weight", None) for name in ("norm_q", "norm_k")]
    has_norms = getattr(attention, "norm_k", None) is not None
    queries, keys, values, outputs = matrices
    if queries is None or keys is None or values is None or outputs is None or has_norms != (None not in norms):
        return None
    width = keys.shape[0]
    if not queries.shape[0] == width == values.shape[0] or outputs.shape[1] < width or width % attention.heads:
        return None
    is_rotary = type(attention.processor).__name__.removeprefix("xFuser") not in _UNTURNED
    return AttentionWeights(attention.heads, queries, keys, values, outputs, norms[0], norms[1], is_rotary)


def _matrix(layer: Any) -> torch.Tensor | None:
    """Return a linear layer's weight where it is a whole matrix of numbers on a device, and not quantised."""
    weight = getattr(layer, "weight", None)
    if is_traceable_wrapper_subclass(weight):
        return None
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return None
    return None if weight.is_meta or hasattr(weight, "_local_tensor") else weight
