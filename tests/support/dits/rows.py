"""Image transformers that work on rows of the latent: SD3, PixArt-alpha, PixArt-sigma, HunyuanDiT, Sana.

Shapes: latents of 16 x 16 in patches of 2 x 2, 4 heads of 16 channels, 8 text tokens of 32 channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from tests.support.dits.case import Case
from tests.support.dits.packed import HEADS, LEVELS, SIZE, TEXT, tiny_vae
from tests.support.dits.weights import noise, ones, seeded

GUIDED = {**SIZE, "guidance_scale": 3.0}
BINNING_OFF = {**GUIDED, "use_resolution_binning": False}


def build_sd3(**config: Any) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=24,
        pos_embed_max_size=16,
        **HEADS,
        **config,
    )
    encoders = dict.fromkeys(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    return StableDiffusion3Pipeline(seeded(transformer), FlowMatchEulerDiscreteScheduler(), tiny_vae(), **encoders)


def sd3_embeds(tokens: int = 7) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, tokens, 32, seed=1),
        "negative_prompt_embeds": noise(1, tokens, 32, seed=2),
        "pooled_prompt_embeds": noise(1, 24, seed=3),
        "negative_pooled_prompt_embeds": noise(1, 24, seed=4),
    }


def build_pixart_alpha() -> PixArtAlphaPipeline:
    return PixArtAlphaPipeline(None, None, tiny_vae(), pixart_transformer(), solver())


def build_pixart_sigma() -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(None, None, tiny_vae(), pixart_transformer(), solver())


def pixart_transformer() -> PixArtTransformer2DModel:
    transformer = PixArtTransformer2DModel(
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=64,
        sample_size=16,
        caption_channels=32,
        **HEADS,
    )
    return seeded(transformer)


def solver() -> DPMSolverMultistepScheduler:
    """Predicts a velocity, which keeps the latents of an untrained network in range."""
    return DPMSolverMultistepScheduler(prediction_type="v_prediction")


def masked_embeds() -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, TEXT, 32, seed=1),
        "prompt_attention_mask": ones(1, TEXT),
        "negative_prompt": None,
        "negative_prompt_embeds": noise(1, TEXT, 32, seed=2),
        "negative_prompt_attention_mask": ones(1, TEXT),
    }


def build_hunyuandit() -> HunyuanDiTPipeline:
    transformer = HunyuanDiT2DModel(
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=64,
        num_layers=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=24,
        pooled_projection_dim=16,
        text_len=TEXT,
        text_len_t5=TEXT,
        **HEADS,
    )
    nothing = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    return HunyuanDiTPipeline(
        vae=tiny_vae(),
        transformer=seeded(transformer),
        scheduler=solver(),
        requires_safety_checker=False,
        **nothing,
    )


def hunyuandit_embeds() -> dict[str, Any]:
    return masked_embeds() | {
        "prompt_embeds_2": noise(1, TEXT, 24, seed=3),
        "prompt_attention_mask_2": ones(1, TEXT),
        "negative_prompt_embeds_2": noise(1, TEXT, 24, seed=4),
        "negative_prompt_attention_mask_2": ones(1, TEXT),
    }


def build_sana() -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=32,
        sample_size=16,
        **HEADS,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8,) * LEVELS,
        decoder_block_out_channels=(8,) * LEVELS,
        encoder_layers_per_block=(1,) * LEVELS,
        decoder_layers_per_block=(1,) * LEVELS,
        encoder_qkv_multiscales=((),) * LEVELS,
        decoder_qkv_multiscales=((),) * LEVELS,
    )
    return SanaPipeline(None, None, vae, seeded(transformer), solver())


SD3 = Case("sd3", build_sd3, sd3_embeds, GUIDED, runner="SD3.5", cfg=True)
ODD = {"height": 112}
"""7 rows of tokens."""
PIXART_ALPHA, PIXART_SIGMA, HUNYUANDIT = (
    Case(name, build, embeds, BINNING_OFF, wrapper=wrapper, cfg=True)
    for name, build, embeds, wrapper in (
        ("pixart-alpha", build_pixart_alpha, masked_embeds, "xFuserPixArtAlphaPipeline"),
        ("pixart-sigma", build_pixart_sigma, masked_embeds, "xFuserPixArtSigmaPipeline"),
        ("hunyuandit", build_hunyuandit, hunyuandit_embeds, "xFuserHunyuanDiTPipeline"),
    )
)
CASES = (
    SD3,
    replace(SD3, name="sd3, 7 rows", call={**GUIDED, **ODD}),
    replace(SD3, name="sd3, 7 rows and 8 text tokens", call={**GUIDED, **ODD}, embeds=lambda: sd3_embeds(8)),
    replace(SD3, name="sd3, 8 text tokens", embeds=lambda: sd3_embeds(8)),
    replace(SD3, name="sd3.5-medium", build=lambda: build_sd3(dual_attention_layers=(0,), qk_norm="rms_norm")),
    replace(
        SD3,
        name="sd3.5-medium, 7 rows",
        build=lambda: build_sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
        call={**GUIDED, **ODD},
    ),
    PIXART_ALPHA,
    PIXART_SIGMA,
    HUNYUANDIT,
    replace(PIXART_SIGMA, name="pixart-sigma, 7 rows", call={**BINNING_OFF, **ODD}),
    replace(HUNYUANDIT, name="hunyuandit, 7 rows", call={**BINNING_OFF, **ODD}),
    Case("sana", build_sana, masked_embeds, BINNING_OFF, wrapper="xFuserSanaPipeline", cfg=True),
)
