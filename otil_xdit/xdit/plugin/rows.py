"""Any height for DiTs whose pipelines xDiT cuts by rows: the rows are filled up until the ranks divide them.

xDiT asks for latents whose rows of tokens its ranks divide. Here its tables are made for a latent that is filled up
with zeros at the bottom, and so are position embeddings. The keys of what fills up are left out of attention
(`otil_xdit.networks.dit.keys`), and its rows are cut off where the pipeline puts its latent together again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.nn import functional

from otil_xdit.networks.dit.token_counts import Rows
from otil_xdit.runtime.session import PatchSession

_TABLES = ("_calc_patches_metadata", "_calc_cogvideox_patches_metadata", "_calc_consisid_patches_metadata")
"""Methods of xDiT's runtime state that cut a height into rows of ranks."""

_ANY_HEIGHT = "_otil_any_height"
"""Attribute of a runtime state whose pipeline may have any height."""


def hook_heights() -> None:
    """Let xDiT's tables and pipelines take heights that the ranks do not divide, where `allow_any_height` says so."""
    from xfuser.core.distributed.runtime_state import DiTRuntimeState
    from xfuser.model_executor.layers import embeddings
    from xfuser.model_executor.pipelines import (
        pipeline_cogvideox,
        pipeline_consisid,
        pipeline_hunyuandit,
        pipeline_stable_diffusion_3,
    )
    from xfuser.model_executor.pipelines.base_pipeline import xFuserPipelineBaseWrapper

    for name in _TABLES:
        setattr(DiTRuntimeState, name, _filled_up(getattr(DiTRuntimeState, name)))
    for owner, name in (
        (xFuserPipelineBaseWrapper, "_init_sync_pipeline"),
        (xFuserPipelineBaseWrapper, "_init_video_sync_pipeline"),
        (pipeline_stable_diffusion_3.xFuserStableDiffusion3Pipeline, "_init_sync_pipeline"),
        (pipeline_hunyuandit.xFuserHunyuanDiTPipeline, "_init_sync_pipeline"),
        (pipeline_cogvideox.xFuserCogVideoXPipeline, "_init_sync_pipeline"),
        (pipeline_consisid.xFuserConsisIDPipeline, "_init_sync_pipeline"),
    ):
        setattr(owner, name, _with_filled_latent(getattr(owner, name)))
    embeddings.xFuserPatchEmbedWrapper.forward = _with_filled_positions(embeddings.xFuserPatchEmbedWrapper.forward)
    video = embeddings.xFuserCogVideoXPatchEmbedWrapper
    video.forward = _at_filled_height(video.forward)


def allow_any_height(state: Any) -> None:
    """Let a runtime state's pipeline have heights that the ranks do not divide."""
    vars(state)[_ANY_HEIGHT] = True


def rows_of(state: Any) -> Rows | None:
    """Return how many rows of latent pixels a runtime state's image has, and has filled up; None where all are real."""
    scale = getattr(state, "vae_scale_factor_spatial", None) or getattr(state, "vae_scale_factor", None)
    height = getattr(getattr(state, "input_config", None), "height", None)
    if scale is None or height is None or not vars(state).get(_ANY_HEIGHT):
        return None
    step = state.backbone_patch_size * state.parallel_config.sp_degree
    real = height // scale
    filled = -(-real // step) * step
    return None if filled == real else Rows(real, filled)


def without_filling(gathered: Any, dim: int, rows: Rows) -> Any:
    """Return a latent that xDiT has gathered from its sequence-parallel ranks, [..., rows, cols], without filling.

    Args:
        gathered: a tensor, or one of each rank.
        dim: along which it is gathered.
    """
    if isinstance(gathered, torch.Tensor):
        is_latent = dim in (-2, gathered.dim() - 2) and gathered.shape[-2] == rows.filled
        return gathered.narrow(-2, 0, rows.real).contiguous() if is_latent else gathered
    each = rows.filled // len(gathered)
    if any(part.dim() < 4 or part.shape[-2] != each for part in gathered):
        return gathered
    return [part[..., : min(max(rows.real - at * each, 0), each), :] for at, part in enumerate(gathered)]


def _rows() -> Rows | None:
    """Return the rows of the generation under way."""
    session = PatchSession.active()
    return None if session is None else session.rows()


def _filled_up(calculate: Callable[[Any], None]) -> Callable[[Any], None]:
    @wraps(calculate)
    def calculate_tables(self: Any) -> None:
        rows, height = rows_of(self), self.input_config.height
        if rows is not None:
            self.input_config.height = rows.filled * (height // rows.real)
        try:
            calculate(self)
        finally:
            self.input_config.height = height

    return calculate_tables


def _with_filled_latent(synchronize: Callable[..., Any]) -> Callable[..., Any]:
    """Return what takes a rank's rows out of latents and rotary embeddings, which it is given filled up."""

    @wraps(synchronize)
    def synchronize_filled(self: Any, latents: torch.Tensor, *others: Any, **named: Any) -> Any:
        rows = _rows()
        if rows is None or latents.shape[-2] != rows.real:
            return synchronize(self, latents, *others, **named)
        side = _state().backbone_patch_size
        tokens = rows.real // side, latents.shape[-1] // side, (rows.filled - rows.real) // side

        def filled(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.dim() >= 4 and value.shape[-2] == rows.real:
                return functional.pad(value, (0, 0, 0, rows.filled - rows.real))
            if isinstance(value, tuple) and all(isinstance(part, torch.Tensor) for part in value):
                return tuple(_fill_frames(part, *tokens) for part in value)
            return value

        named = {name: filled(value) for name, value in named.items()}
        return synchronize(self, filled(latents), *map(filled, others), **named)

    return synchronize_filled


def _fill_frames(embeddings: torch.Tensor, rows: int, cols: int, more: int) -> torch.Tensor:
    """Append `more` rows of tokens to every frame of rotary embeddings, [frames x rows x cols, D]."""
    frames = embeddings.unflatten(0, (-1, rows * cols))
    return functional.pad(frames, (0, 0, 0, more * cols)).flatten(0, 1)


def _with_filled_positions(embed: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `xFuserPatchEmbedWrapper.forward`, which asks for a rank's position embeddings beyond the last row."""

    @wraps(embed)
    def forward(self: Any, latent: torch.Tensor) -> torch.Tensor:
        rows, layer = _rows(), self.module
        if rows is None or layer.pos_embed is None:
            return embed(self, latent)
        tokens = layer.proj(latent)
        tokens = tokens.flatten(2).transpose(1, 2) if layer.flatten else tokens
        tokens = layer.norm(tokens) if layer.layer_norm else tokens
        positions = _positions(layer, rows.real, latent.shape[-1], latent.device)
        start, end = _state().pp_patches_token_start_end_idx_global[0]
        positions = functional.pad(positions, (0, 0, 0, max(end - positions.shape[1], 0)))
        return (tokens + positions[:, start:end]).to(tokens.dtype)

    return forward


def _positions(layer: Any, rows: int, cols: int, device: torch.device) -> torch.Tensor:
    """Return a layer's position embeddings for a latent of `rows` x `cols` pixels, [1, S, C], as diffusers has them."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    if getattr(layer, "pos_embed_max_size", None):
        cropped: torch.Tensor = layer.cropped_pos_embed(rows, cols)
        return cropped
    size = rows // layer.patch_size, cols // layer.patch_size
    made = get_2d_sincos_pos_embed(
        embed_dim=layer.pos_embed.shape[-1],
        grid_size=size,
        base_size=layer.base_size,
        interpolation_scale=layer.interpolation_scale,
        device=device,
        output_type="pt",
    )
    return made.float().unsqueeze(0)


def _at_filled_height(embed: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `xFuserCogVideoXPatchEmbedWrapper.forward`, whose position embeddings do not depend on the height."""

    @wraps(embed)
    def forward(self: Any, *embeddings: torch.Tensor) -> torch.Tensor:
        rows = _rows()
        if rows is None:
            return embed(self, *embeddings)
        sizes = _state().input_config
        height, sizes.height = sizes.height, rows.filled * (sizes.height // rows.real)
        try:
            return embed(self, *embeddings)
        finally:
            sizes.height = height

    return forward


def _state() -> Any:
    from xfuser.core.distributed import get_runtime_state

    return get_runtime_state()
