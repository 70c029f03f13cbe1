"""Video transformers: Wan, HunyuanVideo, CogVideoX, Latte.

Shapes: two latent frames, 4 heads, 8 text tokens of 32 channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LattePipeline,
    LatteTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from tests.support.dits.case import Case
from tests.support.dits.packed import HEADS, SIZE, TEXT, tiny_vae
from tests.support.dits.weights import noise, ones, seeded

FRAMES = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 3.0}
UNCLIPPED = {"clip_sample": False, "prediction_type": "v_prediction"}
"""Saturated values would hide differences; a velocity keeps the latents of an untrained network in range."""
SHIFT = ("--flow_shift", "3.0")


def two_embeds(tokens: int = TEXT) -> dict[str, Any]:
    return {"prompt_embeds": noise(1, tokens, 32, seed=1), "negative_prompt_embeds": noise(1, tokens, 32, seed=2)}


def build_wan(networks: int = 1) -> WanPipeline:
    """Of Wan 2.1, which has one network, or of Wan 2.2, which has one for each part of the steps."""
    transformers = [wan_transformer() for _ in range(networks)]
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    second = {"transformer_2": transformers[1], "boundary_ratio": 0.9} if networks > 1 else {}
    return WanPipeline(None, None, vae, scheduler, transformers[0], **second)


def wan_transformer() -> WanTransformer3DModel:
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return seeded(transformer)


def build_hunyuan_video() -> HunyuanVideoPipeline:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=24,
        rope_axes_dim=(4, 6, 6),
        **HEADS,
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    encoders = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    return HunyuanVideoPipeline(
        transformer=seeded(transformer), vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **encoders
    )


def hunyuan_video_embeds(tokens: int = TEXT) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, tokens, 32, seed=1),
        "pooled_prompt_embeds": noise(1, 24, seed=2),
        "prompt_attention_mask": ones(1, tokens),
    }


def build_cogvideox(rotary: bool = True) -> CogVideoXPipeline:
    transformer = CogVideoXTransformer3DModel(
        in_channels=4,
        out_channels=4,
        time_embed_dim=32,
        text_embed_dim=32,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=rotary,
        **HEADS,
    )
    vae = AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    scheduler = CogVideoXDDIMScheduler(**UNCLIPPED)
    return CogVideoXPipeline(None, None, vae, seeded(transformer), scheduler)


def build_latte() -> LattePipeline:
    transformer = LatteTransformer3DModel(
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=64,
        attention_bias=True,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=32,
        video_length=2,
        **HEADS,
    )
    return LattePipeline(None, None, tiny_vae(), seeded(transformer), DDIMScheduler(**UNCLIPPED))


HUNYUAN_VIDEO = Case("hunyuan-video", build_hunyuan_video, hunyuan_video_embeds, FRAMES, runner="HunyuanVideo")
COGVIDEOX = Case("cogvideox", build_cogvideox, two_embeds, FRAMES, wrapper="xFuserCogVideoXPipeline", cfg=True)
LATTE = Case(
    "latte",
    build_latte,
    two_embeds,
    {**SIZE, "guidance_scale": 3.0, "video_length": 2, "negative_prompt": None, "mask_feature": False},
    wrapper="xFuserLattePipeline",
    cfg=True,
)

WAN = Case("wan", build_wan, two_embeds, {**FRAMES, "negative_prompt": None}, runner="Wan2.1-T2V", runner_flags=SHIFT)
ODD = {"height": 48, "width": 48, "num_frames": 9}
"""27 tokens."""

CASES = (
    WAN,
    replace(WAN, name="wan, 27 tokens", call={**WAN.call, **ODD}),
    replace(WAN, name="wan2.2", build=lambda: build_wan(2), runner="Wan2.2-T2V"),
    HUNYUAN_VIDEO,
    replace(HUNYUAN_VIDEO, name="hunyuan-video, 7 text tokens", embeds=lambda: hunyuan_video_embeds(7)),
    replace(HUNYUAN_VIDEO, name="hunyuan-video, 27 tokens", call={**FRAMES, **ODD}),
    replace(
        HUNYUAN_VIDEO,
        name="hunyuan-video, 27 tokens and 7",
        call={**FRAMES, **ODD},
        embeds=lambda: hunyuan_video_embeds(7),
    ),
    COGVIDEOX,
    replace(COGVIDEOX, name="cogvideox, 7 text tokens", embeds=lambda: two_embeds(7)),
    replace(COGVIDEOX, name="cogvideox, 3 rows", call={**FRAMES, "height": 48}),
    replace(
        COGVIDEOX,
        name="cogvideox, 3 rows and 7 text tokens",
        call={**FRAMES, "height": 48},
        embeds=lambda: two_embeds(7),
    ),
    replace(
        COGVIDEOX,
        name="cogvideox without rotary, 3 rows",
        build=lambda: build_cogvideox(False),
        call={**FRAMES, "height": 48},
    ),
    LATTE,
    replace(LATTE, name="latte, spatial only", call={**LATTE.call, "enable_temporal_attentions": False}),
)
