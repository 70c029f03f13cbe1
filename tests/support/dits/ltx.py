"""Pipelines of LTX-2, 2.3 and 2.5 as xDiT's runners call them, loaded already; text encoders are left out."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

from tests.support.dits.case import Case
from tests.support.dits.networks import LTX2, LTX23, LTX25
from tests.support.dits.packed import image
from tests.support.dits.pipelines import SMALL, TEXT
from tests.support.dits.weights import noise, ones, seeded


def build_ltx2(
    settings: dict[str, Any] = LTX2, kind: type[DiffusionPipeline] = LTX2Pipeline, **connected: Any
) -> DiffusionPipeline:
    """A pipeline of LTX-2, or with other settings of the network and of what connects the text to it, of its heirs."""
    vae = AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        down_block_types=("LTX2VideoDownBlock3D",),
        patch_size=1,
        patch_size_t=1,
    )
    vae.spatial_compression_ratio, vae.temporal_compression_ratio = 32, 4
    audio = AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=16, resolution=32
    )
    small = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    sizes = {f"{modality}_connector_{name}": value for modality in ("video", "audio") for name, value in small.items()}
    connectors = LTX2TextConnectors(
        **{"caption_channels": 32, "text_proj_in_factor": 1, "rope_type": "split", **sizes, **connected}
    )
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        audio_vae=audio,
        text_encoder=None,
        tokenizer=None,
        connectors=seeded(connectors),
        transformer=seeded(LTX2VideoTransformer3DModel(**settings)),
        vocoder=None,
    )


CONNECTED23 = {
    "per_modality_projections": True,
    "video_hidden_dim": 64,
    "audio_hidden_dim": 32,
    "video_connector_attention_head_dim": 16,
    "video_gated_attn": True,
    "audio_gated_attn": True,
}
"""What connects text to the networks of LTX-2.3 and 2.5."""
UNGUIDED = {
    **dict.fromkeys(("guidance_scale", "audio_guidance_scale", "modality_scale", "audio_modality_scale"), 1.0),
    **dict.fromkeys(("stg_scale", "audio_stg_scale", "guidance_rescale", "audio_guidance_rescale"), 0.0),
    "spatio_temporal_guidance_blocks": None,
}
"""How xDiT calls distilled networks, and the second stage, which makes a video larger from the latents of the first."""


def second_stage_embeds() -> dict[str, Any]:
    return {**ltx2_embeds(), "latents": noise(1, 8, 3, 3, 3, seed=3), "audio_latents": noise(1, 2, 10, 4, seed=4)}


def build_ltx23() -> DiffusionPipeline:
    return build_ltx2(LTX23, **CONNECTED23)


def build_ltx25(kind: type[DiffusionPipeline] = LTX2Pipeline) -> DiffusionPipeline:
    pipe = build_ltx2(LTX25, kind, **CONNECTED23)
    first = SimpleNamespace(latents=noise(1, 8, 1, 3, 3, seed=5))  # a real one makes a latent of 32 x 32 pixels
    pipe.vae.encode = lambda *arguments, **options: first
    return pipe


def ltx2_embeds() -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, TEXT, 32, seed=1),
        "prompt_attention_mask": ones(1, TEXT),
        "negative_prompt_embeds": noise(1, TEXT, 32, seed=2),
        "negative_prompt_attention_mask": ones(1, TEXT),
    }


LTX2_CALL = {**SMALL, "height": 96, "width": 96, "spatio_temporal_guidance_blocks": [1]}
SECOND_STAGE = {"sigmas": [0.9, 0.7, 0.4], "noise_scale": 0.9}

CASES = (
    Case("ltx-2", build_ltx2, ltx2_embeds, LTX2_CALL),
    Case("ltx-2.3", build_ltx23, ltx2_embeds, LTX2_CALL),
    Case("ltx-2.3, second stage", build_ltx23, second_stage_embeds, {**LTX2_CALL, **UNGUIDED, **SECOND_STAGE}),
    Case("ltx-2.5, distilled", build_ltx25, ltx2_embeds, {**LTX2_CALL, **UNGUIDED, "sigmas": [1.0, 0.7, 0.4]}),
    Case("ltx-2.5, second stage", build_ltx25, second_stage_embeds, {**LTX2_CALL, **UNGUIDED, **SECOND_STAGE}),
    Case("ltx-2.5, full", build_ltx25, ltx2_embeds, LTX2_CALL),
    Case(
        "ltx-2.5 i2v",
        partial(build_ltx25, LTX2ImageToVideoPipeline),
        lambda: {**ltx2_embeds(), "image": image()},
        LTX2_CALL,
    ),
)
