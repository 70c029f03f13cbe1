"""Attention of a U-Net on patches: this rank's tokens attend to those of all ranks, or to the text.

Shapes: B batch, S tokens of this rank, D features, d features of a head.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch.nn import functional

from otil_xdit.networks.class_swap import subclass_of
from otil_xdit.networks.handles import define_operator, owner_of
from otil_xdit.networks.unet.context import CONTEXT, LayerContext, handle_of, running_context

PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")
"""Attention processors of diffusers that compute plain attention, whatever they compute it with."""

TEXT_PROCESSORS = (
    *PLAIN_PROCESSORS,
    "IPAdapterAttnProcessor",
    "IPAdapterAttnProcessor2_0",
    "IPAdapterXFormersAttnProcessor",
)
"""Processors that may attend to text: every query by itself, so patches change nothing."""


def check_attention(attention: Attention, name: str) -> None:
    """Validate that an attention layer has a processor whose computation is known.

    Raises:
        ValueError: naming the layer and its processor.
    """
    processor = type(attention.processor)
    known = TEXT_PROCESSORS if attention.is_cross_attention else PLAIN_PROCESSORS
    if processor.__name__ not in known or not processor.__module__.startswith("diffusers."):
        raise ValueError(
            f"--parallel does not support the attention processor {processor.__module__}.{processor.__name__} of the "
            f"layer {name}; it knows diffusers' {', '.join(known)}"
        )


@cache
def patched_attention(kind: type) -> type:
    """Derive from `kind`, diffusers' `Attention` or a subclass, the class of an attention layer on patches."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        context = running_context(self)
        if context is not None:
            if encoder_hidden_states is None:
                check_attention(self, context.name)  # a pipeline or a callback may have put another processor in place
                return _self_attention(self, context, hidden_states)
            if type(self.processor).__name__ in PLAIN_PROCESSORS:
                return _cross_attention(self, context, hidden_states, encoder_hidden_states, attention_mask)
        return kind.forward(  # type: ignore[attr-defined]  # diffusers' Attention or a subclass
            self, hidden_states, encoder_hidden_states, attention_mask, **kwargs
        )

    return subclass_of(kind, {"forward": forward, CONTEXT: None})


def _self_attention(attention: Any, context: LayerContext, x: torch.Tensor) -> torch.Tensor:
    """Attend from this rank's tokens to those of all ranks.

    Args:
        x: tokens, [B, S, D], or a map of this rank's rows, [B, D, h, W]; what is returned has its shape.
    """
    if x.ndim == 4:
        tokens = _self_attention(attention, context, x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).reshape(x.shape)
    normed = x
    if attention.group_norm is not None:
        normed = attention.group_norm(x.transpose(1, 2)).transpose(1, 2)
    projections = (attention.to_q, attention.to_k, attention.to_v)
    query, key, value = (_split_heads(attention, project(normed)) for project in projections)
    query, key = _norm_query_key(attention, query, key)
    if torch.compiler.is_compiling():
        handle = handle_of(context)
        out = _attend_operator(handle.number, handle.order, query, key, value)
    else:
        out = context.exchange.attend(context, query, key, value)
    return _project_out(attention, out, x)


def _cross_attention(
    attention: Any, context: LayerContext, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attend from this rank's tokens, [B, S, D], to the text, whose keys and values are kept from step to step."""

    def project() -> tuple[torch.Tensor, torch.Tensor]:
        states = attention.norm_encoder_hidden_states(text) if attention.norm_cross else text
        return _split_heads(attention, attention.to_k(states)), _split_heads(attention, attention.to_v(states))

    assert context.text_cache is not None, "a network with cross-attention has a text cache"
    if torch.compiler.is_compiling():
        key, value = project()
    else:
        key, value = context.text_cache.get(context.name, text, (attention.to_k, attention.to_v), project)
    query, key = _norm_query_key(attention, _split_heads(attention, attention.to_q(x)), key)
    if mask is not None:
        mask = attention.prepare_attention_mask(mask, text.shape[1], x.shape[0])
        mask = mask.view(x.shape[0], attention.heads, -1, mask.shape[-1])
    return _project_out(attention, functional.scaled_dot_product_attention(query, key, value, attn_mask=mask), x)


def _split_heads(attention: Any, x: torch.Tensor) -> torch.Tensor:
    """View [B, S, heads * d] as [B, heads, S, d]."""
    return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def _norm_query_key(attention: Any, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    query = query if attention.norm_q is None else attention.norm_q(query)
    return query, key if attention.norm_k is None else attention.norm_k(key)


def _project_out(attention: Any, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Join heads, [B, heads, S, d] to [B, S, D], and apply what follows attention in diffusers."""
    out = attention.to_out[1](attention.to_out[0](out.transpose(1, 2).flatten(2).to(x.dtype)))
    out = (out + x) if attention.residual_connection else out
    return out if attention.rescale_output_factor == 1 else out / attention.rescale_output_factor


def _compute(
    number: torch.Tensor, order: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    context: LayerContext = owner_of(number)
    out = context.exchange.attend(context, query, key, value)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _like(
    number: torch.Tensor, order: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    batch, heads, tokens, size = query.shape
    return query.new_empty(batch, tokens, heads, size).transpose(1, 2)


_attend_operator = define_operator("attend", "Tensor query, Tensor key, Tensor value", "Tensor", _compute, _like)
"""`LayerExchange.attend` in a compiled graph."""
