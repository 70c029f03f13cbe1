"""The seam: what stands in the place of xDiT's `ring_attn` while a pipeline runs with a parallel strategy.

xDiT's ring attention passes keys and values round and merges partial results by log-sum-exp, which few attention
backends support. Here the keys and values of all patches are gathered first (fresh or not, as the strategy says), and
the backend is called once, so any backend will do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from otil_xdit.runtime.session import PatchSession

_KEY_POSITIONS = ("indices_k", "cu_seqlens_k", "attn_mask", "attention_mask", "key_padding_mask")
"""Attention arguments that describe this rank's keys; with everybody's keys in their place they would be wrong."""


def over_patches(ring_attn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`ring_attn` of xfuser's usp module, replaced while a `PatchSession` is active and untouched otherwise."""

    @wraps(ring_attn)
    @torch.compiler.disable
    def patch_attn(
        attention_function: Callable[..., Any],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        joint_attn_kwargs: dict[str, Any] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        session = PatchSession.active()
        if session is None:
            return ring_attn(
                attention_function, query, key, value, dropout_p, is_causal, joint_attn_kwargs, attention_kwargs
            )
        _refuse(is_causal, attention_kwargs)
        key, value = session.gather(key, value)
        if joint_attn_kwargs is not None:
            # One call in place of a ring of them: the text is joined in it, be it "front" (at the first step of a
            # ring) or "rear" (at the last).
            joint_attn_kwargs = {**joint_attn_kwargs, "step": 0, "total_steps": 1}
        out, *_ = attention_function(
            query,
            key,
            value,
            dropout_p=dropout_p,
            is_causal=is_causal,
            joint_attn_kwargs=joint_attn_kwargs,
            attention_kwargs=attention_kwargs,
        )
        return out

    return patch_attn


def without_padding(get_attention_function: Callable[..., Any]) -> Callable[..., Any]:
    """`_get_attention_function` of xfuser's usp module: the backend it finds, called without keys that are padding.

    Only a U-Net whose ranks have different numbers of rows pads (`PatchSession.kept_keys`). Ring attention is not in
    the way with Ulysses alone, so this cannot be left to `over_patches`.
    """

    @wraps(get_attention_function)
    def get(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        attention_function = get_attention_function(*args, **kwargs)
        session = PatchSession.active()
        kept = None if session is None else session.kept_keys
        if kept is None:
            return attention_function

        @wraps(attention_function)
        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
            return attention_function(query, key.index_select(2, kept), value.index_select(2, kept), **options)

        return attend

    return get


def _refuse(is_causal: bool, attention_kwargs: dict[str, Any] | None) -> None:
    if is_causal:
        raise ValueError("causal attention is not supported with --parallel: a patch has no place in the causal order")
    masks = [name for name in _KEY_POSITIONS if (attention_kwargs or {}).get(name) is not None]
    if masks:
        raise ValueError(f"attention with {', '.join(masks)} is not supported with --parallel: it describes local keys")
