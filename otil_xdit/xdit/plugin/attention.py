"""What stands in the place of xDiT's attention and guidance while a pipeline runs with a parallel strategy.

xDiT's ring attention passes keys and values round and merges partial results by log-sum-exp, which few attention
backends support. Here the keys and values of all patches are gathered first (fresh or not, as the strategy says), and
the backend is called once, so any backend will do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import wraps
from typing import Any

import torch

from otil_xdit.runtime.session import PatchSession
from otil_xdit.xdit.plugin.graph_attention import GraphAttention
from otil_xdit.xdit.plugin.rows import without_filling
from otil_xdit.xdit.plugin.token_shares import join_tokens

_KEY_POSITIONS = ("indices_k", "cu_seqlens_k", "attn_mask", "attention_mask", "key_padding_mask")
"""Attention arguments that describe this rank's keys; with everybody's keys in their place they would be wrong."""


def hook_attention() -> None:
    """Replace xDiT's ring attention while a session is active."""
    from xfuser.model_executor.layers import usp

    usp.ring_attn = over_patches(usp.ring_attn)
    usp._get_attention_function = without_padding(usp._get_attention_function)
    usp._trim_trailing_kv_padding = without_patches(usp._trim_trailing_kv_padding)


def hook_gathered() -> None:
    """Show the session the predictions of CFG parallelism, and cut filling off latents: both are gathered by this."""
    from xfuser.core.distributed import parallel_state
    from xfuser.core.distributed.group_coordinator import GroupCoordinator

    all_gather = GroupCoordinator.all_gather

    @wraps(all_gather)
    def gather(self: Any, input_: torch.Tensor, dim: int = 0, separate_tensors: bool = False) -> Any:
        session = PatchSession.active()
        is_sequence = session is not None and self is parallel_state.get_sp_group()
        if session is not None and is_sequence and session.dit.keys.cut.shares and not separate_tensors:
            return join_tokens(all_gather, self, input_, dim)
        gathered = all_gather(self, input_, dim, separate_tensors)
        if session is None or self.world_size == 1:
            return gathered
        if is_sequence:
            rows = session.rows()
            return gathered if rows is None else without_filling(gathered, dim, rows)
        if self is not parallel_state.get_cfg_group():
            return gathered
        return session.record_gathered(gathered, dim, input_)

    GroupCoordinator.all_gather = gather


def over_patches(ring_attn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `ring_attn` of xfuser's usp module, replaced while a `PatchSession` is active and untouched otherwise."""

    @wraps(ring_attn)
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
        if isinstance(attention_function, GraphAttention):
            return attention_function.attend(
                True, query, key, value, dropout_p, is_causal, joint_attn_kwargs, attention_kwargs
            )
        masks = _masks(attention_kwargs)
        _check_attention(is_causal, () if session.dit.has_whole_masks else masks)
        key, value = session.gather(key, value)
        if masks:
            session.dit.keep_all()
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
    """Return `_get_attention_function` of xfuser's usp module, whose backends are called without keys that are padding.

    A U-Net pads where its ranks have different numbers of rows, a DiT where they do not divide its tokens
    (`PatchSession.kept_keys`). Ring attention is not in the way with Ulysses alone, so this cannot be left to
    `over_patches`.
    """

    @wraps(get_attention_function)
    def get(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        session = PatchSession.active()
        if session is not None and torch.compiler.is_compiling():
            return GraphAttention(*args, **kwargs)
        attention_function = get_attention_function(*args, **kwargs)
        if session is None:
            return attention_function

        @wraps(attention_function)
        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
            kept = session.kept_keys
            if isinstance(kept, tuple):
                return _sample_by_sample(attention_function, kept, query, key, value, options)
            if kept is not None:
                key, value = key.index_select(2, kept), value.index_select(2, kept)
            elif (count := session.dit.kept_of_gathered(key.shape[2])) is not None:
                key, value = key[:, :, :count], value[:, :, :count]
            return attention_function(query, key, value, **options)

        return attend

    return get


def without_patches(trim: Callable[..., Any]) -> Callable[..., Any]:
    """Return `_trim_trailing_kv_padding` of xfuser's usp module, which `USP` calls with the keys it is to attend to.

    With several patches `over_patches` sees to padding; with Ulysses alone, or CFG parallelism, this is the place.
    """

    @wraps(trim)
    def trimmed(key: torch.Tensor, value: torch.Tensor, attention_kwargs: dict[str, Any] | None) -> Any:
        session = PatchSession.active()
        if session is not None and torch.compiler.is_compiling():
            return key, value  # `GraphAttention` sees to it
        if session is not None and session.group.world_size == 1 and not _masks(attention_kwargs):
            session.dit.keep_real(key)
        return trim(key, value, attention_kwargs)

    return trimmed


def _sample_by_sample(
    attention_function: Callable[..., Any],
    kept: tuple[torch.Tensor, ...],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Attend for each sample to its own real keys, which any backend can, as there is no mask in it."""
    outputs = [
        attention_function(
            query[index : index + 1],
            key[index : index + 1].index_select(2, one),
            value[index : index + 1].index_select(2, one),
            **options,
        )[0]
        for index, one in enumerate(kept)
    ]
    return torch.cat(outputs), None


def _masks(attention_kwargs: dict[str, Any] | None) -> list[str]:
    return [name for name in _KEY_POSITIONS if (attention_kwargs or {}).get(name) is not None]


def _check_attention(is_causal: bool, masks: Collection[str]) -> None:
    """Check that attention depends on no position and no mask of this rank's keys.

    Args:
        is_causal: whether it depends on the order of the keys.
        masks: names of what describes this rank's keys.

    Raises:
        ValueError: naming what it depends on.
    """
    if is_causal:
        raise ValueError("causal attention is not supported with --parallel: a patch has no place in the causal order")
    if masks:
        raise ValueError(f"attention with {', '.join(masks)} is not supported with --parallel: it describes local keys")
