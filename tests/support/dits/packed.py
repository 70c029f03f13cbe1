"""Image transformers that work on a sequence of packed tokens: Flux, Flux.2, Qwen-Image, Z-Image, Krea 2, Lumina2.

Shapes: latents of 16 x 16, 8 x 8 = 64 image tokens, 4 heads of 16 channels, 8 text tokens of 32 channels.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from tests.support.dits.case import Case
from tests.support.dits.weights import noise, ones, seeded

SIZE = {"height": 128, "width": 128, "num_inference_steps": 3}
HEADS = {"num_attention_heads": 4, "attention_head_dim": 16}
TEXT = 8


LEVELS = 4
"""Of a VAE; its scale factor is 8, as in the real models: the plugin reckons patches from it."""


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(**tiny_levels(), shift_factor=0.0)


def tiny_levels() -> dict[str, Any]:
    return {
        "block_out_channels": (8,) * LEVELS,
        "down_block_types": ("DownEncoderBlock2D",) * LEVELS,
        "up_block_types": ("UpDecoderBlock2D",) * LEVELS,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
    }


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1] * LEVELS,
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def build_flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
        **HEADS,
    )
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), tiny_vae(), None, None, None, None, seeded(transformer))


def flux_embeds(tokens: int = TEXT) -> dict[str, Any]:
    return {"prompt_embeds": noise(1, tokens, 32, seed=1), "pooled_prompt_embeds": noise(1, 24, seed=2)}


def build_flux2() -> Flux2Pipeline:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        **HEADS,
    )
    vae = AutoencoderKLFlux2(**tiny_levels())
    return Flux2Pipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, seeded(transformer))


def build_qwen() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6), **HEADS
    )
    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), qwen_vae(), None, None, seeded(transformer))


def qwen_embeds(tokens: int = TEXT) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, tokens, 32, seed=1),
        "prompt_embeds_mask": ones(1, tokens),
        "negative_prompt_embeds": noise(1, tokens, 32, seed=2),
        "negative_prompt_embeds_mask": ones(1, tokens),
    }


def build_z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 64, 64],
    )
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(), tiny_vae(), None, None, seeded(transformer))


def z_image_embeds() -> dict[str, Any]:
    return {"prompt_embeds": [noise(TEXT, 32, seed=1)], "negative_prompt_embeds": [noise(TEXT, 32, seed=2)]}


def name_parameters(wrapper: type) -> None:
    """Where xDiT's `__init__` takes `**kwargs`, diffusers would drop the saved configuration and build full size."""
    wrapper.__init__.__signature__ = inspect.signature(wrapper.__base__.__init__)


def name_z_image_parameters() -> None:
    from xfuser.model_executor.models.transformers import transformer_z_image

    name_parameters(transformer_z_image.xFuserZImageTransformer2DWrapper)


def drop_z_image_argument() -> None:
    """diffusers 0.42 passes `joint_attention_kwargs`, which xDiT's forward does not take."""
    from xfuser.model_executor.models.transformers import transformer_z_image

    name_z_image_parameters()
    wrapper = transformer_z_image.xFuserZImageTransformer2DWrapper
    forward = inspect.unwrap(wrapper.forward)

    @wraps(forward)
    def without_argument(self: Any, *arguments: Any, joint_attention_kwargs: Any = None, **options: Any) -> Any:
        return forward(self, *arguments, **options)

    wrapper.forward = without_argument


def build_lumina2() -> Lumina2Pipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 64, 64),
        cap_feat_dim=32,
    )
    return Lumina2Pipeline(seeded(transformer), FlowMatchEulerDiscreteScheduler(), tiny_vae(), None, None)


def lumina2_embeds(tokens: int = TEXT) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, tokens, 32, seed=1),
        "prompt_attention_mask": torch.ones(1, tokens, dtype=torch.bool),
        "negative_prompt_embeds": noise(1, tokens, 32, seed=2),
        "negative_prompt_attention_mask": torch.ones(1, tokens, dtype=torch.bool),
    }


def allow_lumina2_ring() -> None:
    """xDiT refuses ring attention because a ring needs a mask a step; gathered keys fit Lumina2's own mask."""
    from xfuser.model_executor.models.runner_models import lumina2 as runner
    from xfuser.model_executor.models.transformers import transformer_lumina2

    model = runner.xFuserLumina2Model
    model.capabilities = replace(model.capabilities, ring_degree=True)
    transformer_lumina2.get_ring_parallel_world_size = lambda: 1


def build_krea2() -> Krea2Pipeline:
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_key_value_heads=2,
        intermediate_size=64,
        timestep_embed_dim=32,
        text_hidden_dim=32,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=64,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
        **HEADS,
    )
    return Krea2Pipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), qwen_vae(), None, None, seeded(transformer)
    )


def krea2_embeds(tokens: int = TEXT) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, tokens, 2, 32, seed=1),
        "prompt_embeds_mask": ones(1, tokens).bool(),
        "negative_prompt": None,
        "negative_prompt_embeds": noise(1, tokens, 2, 32, seed=2),
        "negative_prompt_embeds_mask": ones(1, tokens).bool(),
    }


def allow_krea2_ring() -> None:
    from xfuser.model_executor.models.runner_models import krea2 as runner
    from xfuser.model_executor.models.transformers import transformer_krea2

    name_parameters(transformer_krea2.xFuserKrea2Transformer2DWrapper)
    model = runner.xFuserKrea2RawModel
    model.capabilities = replace(model.capabilities, ring_degree=True)


FLUX = Case("flux", build_flux, flux_embeds, {**SIZE, "guidance_scale": 3.5}, runner="FLUX.1-dev")
QWEN = Case("qwen-image", build_qwen, qwen_embeds, {**SIZE, "true_cfg_scale": 3.0}, runner="Qwen-Image")
Z_IMAGE = Case(
    "z-image",
    build_z_image,
    z_image_embeds,
    {**SIZE, "guidance_scale": 3.0},
    runner="Z-Image",
    cfg=True,
    prepare=name_z_image_parameters,
)
LUMINA2_CALL = {**SIZE, "guidance_scale": 3.0, "cfg_trunc_ratio": 1.0}
LUMINA2 = Case("lumina2", build_lumina2, lumina2_embeds, LUMINA2_CALL, runner="Lumina2", cfg=True)
KREA2 = Case("krea2", build_krea2, krea2_embeds, {**SIZE, "guidance_scale": 3.0}, runner="krea/krea-2-raw")
LUMINA2_RING = replace(LUMINA2, name="lumina2, ring allowed", prepare=allow_lumina2_ring)
KREA2_RING = replace(KREA2, name="krea2, ring allowed", prepare=allow_krea2_ring)

CASES = (
    FLUX,
    replace(FLUX, name="flux, 7 text tokens", embeds=lambda: flux_embeds(7)),
    Case(
        "flux2",
        build_flux2,
        lambda: {"prompt_embeds": noise(1, TEXT, 32, seed=1)},
        {**SIZE, "guidance_scale": 3.5},
        runner="FLUX.2-dev",
    ),
    QWEN,
    replace(QWEN, name="qwen-image, 7 text tokens", embeds=lambda: qwen_embeds(7)),
    Z_IMAGE,
    replace(Z_IMAGE, name="z-image, argument dropped", prepare=drop_z_image_argument),
    LUMINA2,
    LUMINA2_RING,
    replace(LUMINA2_RING, name="lumina2, ring allowed, 7 text tokens", embeds=lambda: lumina2_embeds(7)),
    KREA2,
    KREA2_RING,
    replace(KREA2_RING, name="krea2, ring allowed, 7 text tokens", embeds=lambda: krea2_embeds(7)),
)
