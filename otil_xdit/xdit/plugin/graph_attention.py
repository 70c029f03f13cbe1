"""Attention in the graph of a compiled DiT: one operator does what eager code does in xDiT's `USP` after Ulysses.

Shapes: B batch, H heads, S tokens, d features of a head; J tokens of the text that is joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from otil_xdit.networks.dit.layer_names import place_under_way
from otil_xdit.networks.handles import define_operator, owner_of


class GraphAttention:
    """What `_get_attention_function` of xfuser's usp module returns while a graph is made.

    Args:
        backend: an `AttentionBackendType`; None for that of the runtime state.

    Attributes:
        backend: its name; empty for None.
    """

    def __init__(self, backend: Any) -> None:
        self.backend: str = "" if backend is None else backend.name

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        joint_attn_kwargs: Mapping[str, Any] | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Attend to this rank's keys."""
        return self.attend(False, query, key, value, dropout_p, is_causal, joint_attn_kwargs, attention_kwargs), None

    def attend(
        self,
        ring: bool,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float,
        is_causal: bool,
        joint: Mapping[str, Any] | None,
        attention_kwargs: Mapping[str, Any] | None,
    ) -> torch.Tensor:
        """Put the attention of this rank's queries, [B, H, S, d], into the graph.

        Args:
            ring: to the keys of all patches, or to this rank's.
            query, key, value, dropout_p, is_causal, joint, attention_kwargs: as `ring_attn` takes them.
        """
        place = place_under_way()
        assert place is not None and place.handle is not None, "hooks of the attention module that calls have named it"
        masks = {name: mask for name, mask in (attention_kwargs or {}).items() if mask is not None}
        if not all(isinstance(mask, torch.Tensor) for mask in masks.values()):
            return _beside_graph(self, ring, (query, key, value), dropout_p, is_causal, joint, attention_kwargs)
        known = {} if joint is None else joint
        out: torch.Tensor = _attend_operator(
            place.handle.number,
            place.handle.order,
            query,
            key,
            value,
            known.get("joint_key"),
            known.get("joint_value"),
            known.get("joint_strategy") or "",
            [*masks.values()],
            ",".join(masks),
            self.backend,
            ring,
            dropout_p,
            is_causal,
        )
        return out


@torch.compiler.disable
def _beside_graph(
    attention: GraphAttention,
    ring: bool,
    inputs: Sequence[torch.Tensor],
    dropout_p: float,
    is_causal: bool,
    joint: Mapping[str, Any] | None,
    attention_kwargs: Mapping[str, Any] | None,
) -> torch.Tensor:
    """Attend with arguments that no operator takes, at the price of a break of the graph."""
    return _attend(attention.backend, ring, inputs, dropout_p, is_causal, joint, attention_kwargs)


def _attend(
    backend: str,
    ring: bool,
    inputs: Sequence[torch.Tensor],
    dropout_p: float,
    is_causal: bool,
    joint: Mapping[str, Any] | None,
    attention_kwargs: Mapping[str, Any] | None,
) -> torch.Tensor:
    """Do what `USP` does with these, by the hooks of `otil_xdit.xdit.plugin.attention`."""
    from xfuser.core.distributed.attention_backend import AttentionBackendType
    from xfuser.model_executor.layers import usp

    query, key, value = inputs
    options = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "joint_attn_kwargs": None if joint is None else {**joint, "step": 0, "total_steps": 1},
        "attention_kwargs": attention_kwargs,
    }
    function = usp._get_attention_function(backend=AttentionBackendType[backend] if backend else None)
    if ring:
        out: torch.Tensor = usp.ring_attn(function, query, key, value, **options)
    else:
        key, value = usp._trim_trailing_kv_padding(key, value, attention_kwargs)
        out, *_ = function(query, key, value, **options)
    return out


def _compute(
    number: torch.Tensor,
    order: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    joint_key: torch.Tensor | None,
    joint_value: torch.Tensor | None,
    joint_strategy: str,
    masks: list[torch.Tensor],
    names: str,
    backend: str,
    ring: bool,
    dropout_p: float,
    is_causal: bool,
) -> torch.Tensor:
    joint = None
    if joint_key is not None:
        joint = {"joint_key": joint_key, "joint_value": joint_value, "joint_strategy": joint_strategy}
    attention_kwargs = dict(zip(names.split(","), masks, strict=True)) if masks else None
    with owner_of(number).entered():
        out = _attend(backend, ring, (query, key, value), dropout_p, is_causal, joint, attention_kwargs)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _like(
    number: torch.Tensor, order: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any
) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[3]).transpose(1, 2)


_attend_operator = define_operator(
    "attend_over_patches",
    "Tensor query, Tensor key, Tensor value, Tensor? joint_key, Tensor? joint_value, str joint_strategy, "
    "Tensor[] masks, str names, str backend, bool ring, float dropout_p, bool is_causal",
    "Tensor",
    _compute,
    _like,
)
