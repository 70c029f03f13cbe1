"""What puts xfuser's mistakes right: each gets a class of xfuser, and replaces methods of it (`shims.SHIMS`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch.nn import functional

from otil_xdit.networks.dit.token_counts import missing_frames
from otil_xdit.runtime.session import PatchSession
from otil_xdit.xdit.plugin.token_shares import cut_tokens

_WITHOUT_RING: ContextVar[bool] = ContextVar("otil_xdit_without_ring", default=False)


@contextmanager
def without_ring() -> Iterator[None]:
    """Bracket what builds a pipeline for a strategy, under which keys are gathered and no ring is needed."""
    token = _WITHOUT_RING.set(True)
    try:
        yield
    finally:
        _WITHOUT_RING.reset(token)


def sd3(processor: Any) -> None:
    call = processor.__call__

    @wraps(call)
    def __call__(
        self: Any, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        from xfuser.core.distributed import get_sequence_parallel_world_size

        if encoder_hidden_states is None and get_sequence_parallel_world_size() > 1:
            return _attend_to_the_image(attn, hidden_states)
        return call(self, attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    processor.__call__ = __call__


def _attend_to_the_image(attn: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Compute SD3.5's second attention of a block, [B, S, C]; diffusers' `JointAttnProcessor2_0` without text."""
    from xfuser.model_executor.layers import usp

    query, key, value = (
        project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
    )
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    out = usp.USP(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_layer=attn)
    out = out.transpose(1, 2).flatten(2, 3).to(query.dtype)
    result: torch.Tensor = attn.to_out[1](attn.to_out[0](out))
    return result


def flux(wrapper: Any) -> None:
    wrapper._pad_to_sp_divisible = wrapper.pad_to_sp_divisible


def flux2(wrapper: Any) -> None:
    forward = wrapper.forward

    @wraps(forward)
    def padded(self: Any, hidden_states: Any, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
        session = PatchSession.active()
        if session is not None:  # which leaves the padding out of the keys
            ranks = session.group.ulysses_degree * session.group.world_size
            encoder_hidden_states = _fill_up(encoder_hidden_states, ranks)
            kwargs["txt_ids"] = _fill_up(kwargs["txt_ids"], ranks)
        return forward(self, hidden_states, encoder_hidden_states, *args, **kwargs)

    wrapper.forward = padded


def _fill_up(tokens: torch.Tensor, ranks: int) -> torch.Tensor:
    """Append zeros to tokens, [..., S, C], until the ranks divide S."""
    return functional.pad(tokens, (0, 0, 0, -tokens.shape[-2] % ranks))


def z_image(wrapper: Any) -> None:
    from diffusers.utils.peft_utils import apply_lora_scale

    forward = wrapper.forward

    @wraps(forward)
    def scaled(self: Any, *args: Any, joint_attention_kwargs: Any = None, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    wrapper.forward = apply_lora_scale("joint_attention_kwargs")(scaled)


def qwen(wrapper: Any) -> None:
    init = wrapper.__init__

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        for block in self.transformer_blocks if self.zero_cond_t else ():
            block.register_forward_pre_hook(_cut_modulation, with_kwargs=True)

    wrapper.__init__ = __init__


def _cut_modulation(
    block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a block this rank's part of what tells noisy tokens from given ones, int [B, S]."""
    from xfuser.core.distributed import get_sequence_parallel_rank, get_sequence_parallel_world_size

    index, ranks = kwargs["modulate_index"], get_sequence_parallel_world_size()
    index = functional.pad(index, (0, -index.shape[1] % ranks))
    return args, {**kwargs, "modulate_index": cut_tokens(index, ranks, dim=1)[get_sequence_parallel_rank()]}


def hunyuan_video(wrapper: Any) -> None:
    forward = wrapper.forward

    @wraps(forward)
    def filled(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        session, frames, side = PatchSession.active(), hidden_states.shape[2], self.config.patch_size
        if session is not None:  # which leaves the frames that are added out of the keys
            ranks = session.group.ulysses_degree * session.group.world_size
            tokens = (hidden_states.shape[3] // side) * (hidden_states.shape[4] // side)
            more = missing_frames(frames // self.config.patch_size_t, tokens, ranks) * self.config.patch_size_t
            hidden_states = functional.pad(hidden_states, (0, 0, 0, 0, 0, more))
        out = forward(self, hidden_states, *args, **kwargs)
        sample = out[0][:, :, :frames]
        return (sample, *out[1:]) if isinstance(out, tuple) else type(out)(sample=sample)

    wrapper.forward = filled


def cosmos3(wrapper: Any) -> None:
    forward = wrapper.forward

    @wraps(forward)
    def as_tuple(self: Any, *args: Any, return_dict: bool = False, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)  # a tuple, but on one rank, where it is diffusers' own
        return out if isinstance(out, tuple) or return_dict else out.to_tuple()

    wrapper.forward = as_tuple


def consisid(pipeline: Any) -> None:
    from xfuser.model_executor.pipelines.pipeline_cogvideox import xFuserCogVideoXPipeline

    if "prepare_extra_step_kwargs" not in vars(pipeline):
        # diffusers' own asks xDiT's wrapper of the scheduler what it takes, and that takes anything.
        pipeline.prepare_extra_step_kwargs = xFuserCogVideoXPipeline.prepare_extra_step_kwargs


def lumina2(wrapper: Any) -> None:
    module = importlib.import_module(wrapper.__module__)
    size: Callable[[], int] = module.get_ring_parallel_world_size

    @wraps(size)
    def ring_size() -> int:
        return 1 if _WITHOUT_RING.get() else size()

    vars(module)["get_ring_parallel_world_size"] = ring_size


def flux2_cache(blocks: Any) -> None:
    """Compare with what the last computed step has left, which is overwritten in place before it is looked at."""
    get = blocks.get_modulated_inputs

    @wraps(get)
    def get_modulated_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept = self.cache_context.modulated_inputs
        if kept is not None:
            self.cache_context.modulated_inputs = kept.clone()
        return get(self, *args, **kwargs)

    blocks.get_modulated_inputs = get_modulated_inputs
