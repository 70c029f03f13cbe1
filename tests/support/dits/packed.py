"""Image transformers that work on a sequence of packed tokens: Flux, Flux.2, Qwen-Image, Z-Image, Krea 2, Lumina2.

Shapes: latents of 16 x 16, 8 x 8 = 64 image tokens, 4 heads of 16 channels, 8 text tokens of 32 channels.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    ModelMixin,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image

from tests.support.dits.case import Case
from tests.support.dits.weights import noise, ones, seeded

SIZE = {"height": 128, "width": 128, "num_inference_steps": 3}
HEADS = {"num_attention_heads": 4, "attention_head_dim": 16}
TEXT = 8
ODD = {"height": 112, "width": 112}
"""49 tokens."""


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


def build_kontext() -> FluxKontextPipeline:
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=seeded(tiny_vae()),
        transformer=build_flux().transformer,
        **dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]),
    )


def kontext_embeds(tokens: int = TEXT) -> dict[str, Any]:
    return {**flux_embeds(tokens), "image": image()}


def image() -> Image.Image:
    """An image to be edited."""
    return Image.fromarray(noise(128, 128, 3, seed=3).mul(60).add(128).clamp(0, 255).byte().numpy())


def flux2_embeds(tokens: int = TEXT) -> dict[str, Any]:
    return {"prompt_embeds": noise(1, tokens, 32, seed=1)}


def settings_of(network: ModelMixin, **others: Any) -> dict[str, Any]:
    """What a network was built from, with other values for some."""
    return {**{name: value for name, value in network.config.items() if name[0] != "_"}, **others}


def build_klein() -> Flux2KleinPipeline:
    flux2 = build_flux2()
    transformer = Flux2Transformer2DModel(**settings_of(flux2.transformer, guidance_embeds=False))
    return Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(), flux2.vae, None, None, seeded(transformer))


def klein_embeds(tokens: int = TEXT) -> dict[str, Any]:
    return {**flux2_embeds(tokens), "negative_prompt_embeds": noise(1, tokens, 32, seed=2)}


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


def build_qwen_edit(**config: Any) -> QwenImageEditPipeline:
    keep_small()
    transformer = QwenImageTransformer2DModel(**settings_of(build_qwen().transformer, **config))
    vae = seeded(qwen_vae())
    return QwenImageEditPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, seeded(transformer))


def qwen_edit_embeds(tokens: int = TEXT) -> dict[str, Any]:
    return {**qwen_embeds(tokens), "image": image()}


def keep_small(module: Any = pipeline_qwenimage_edit) -> None:
    """Have the pipeline not enlarge the image that it edits to 1024 x 1024 pixels."""
    module.calculate_dimensions = lambda *arguments: (128, 128, None)


def keep_small_in_xdit() -> None:
    keep_small(importlib.import_module("xfuser.model_executor.pipelines.pipeline_qwen_image_edit"))


def qwen_batch_embeds() -> dict[str, Any]:
    """Two prompts, of 7 and of 4 tokens."""
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return {
        "prompt_embeds": noise(2, 7, 32, seed=1),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": noise(2, 7, 32, seed=2),
        "negative_prompt_embeds_mask": mask,
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


def z_image_embeds(tokens: int = TEXT) -> dict[str, Any]:
    return {"prompt_embeds": [noise(tokens, 32, seed=1)], "negative_prompt_embeds": [noise(TEXT, 32, seed=2)]}


def name_parameters(wrapper: type) -> None:
    """Where xDiT's `__init__` takes `**kwargs`, diffusers would drop the saved configuration and build full size."""
    wrapper.__init__.__signature__ = inspect.signature(wrapper.__base__.__init__)


def name_z_image_parameters() -> None:
    from xfuser.model_executor.models.transformers import transformer_z_image

    name_parameters(transformer_z_image.xFuserZImageTransformer2DWrapper)


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


def name_krea2_parameters() -> None:
    from xfuser.model_executor.models.transformers import transformer_krea2

    name_parameters(transformer_krea2.xFuserKrea2Transformer2DWrapper)


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
KREA2 = Case(
    "krea2",
    build_krea2,
    krea2_embeds,
    {**SIZE, "guidance_scale": 3.0},
    runner="krea/krea-2-raw",
    prepare=name_krea2_parameters,
)
KONTEXT = Case(
    "flux-kontext",
    build_kontext,
    kontext_embeds,
    {**SIZE, "guidance_scale": 3.5, "max_area": 128 * 128, "_auto_resize": False},
    runner="FLUX.1-Kontext-dev",
    edits=True,
)
FLUX2 = Case("flux2", build_flux2, flux2_embeds, {**SIZE, "guidance_scale": 3.5}, runner="FLUX.2-dev")
KLEIN = Case("flux2-klein", build_klein, klein_embeds, {**SIZE, "guidance_scale": 3.0}, runner="FLUX.2-klein-4B")
QWEN_EDIT = Case(
    "qwen-image-edit",
    build_qwen_edit,
    qwen_edit_embeds,
    {**SIZE, "true_cfg_scale": 3.0, "negative_prompt": None},
    runner="Qwen-Image-Edit",
    edits=True,
    prepare=keep_small_in_xdit,
)

CASES = (
    FLUX,
    replace(FLUX, name="flux, 7 text tokens", embeds=lambda: flux_embeds(7)),
    replace(FLUX, name="flux, 49 tokens and 7", call={**FLUX.call, **ODD}, embeds=lambda: flux_embeds(7)),
    KONTEXT,
    replace(KONTEXT, name="flux-kontext, 7 text tokens", embeds=lambda: kontext_embeds(7)),
    FLUX2,
    replace(FLUX2, name="flux2, 7 text tokens", embeds=lambda: flux2_embeds(7)),
    KLEIN,
    replace(KLEIN, name="flux2-klein, 7 text tokens", embeds=lambda: klein_embeds(7)),
    QWEN,
    replace(QWEN, name="qwen-image, prompts of 7 and 4 tokens", embeds=qwen_batch_embeds),
    replace(QWEN, name="qwen-image, 49 tokens and 7", call={**QWEN.call, **ODD}, embeds=lambda: qwen_embeds(7)),
    QWEN_EDIT,
    replace(QWEN_EDIT, name="qwen-image-edit, 7 text tokens", embeds=lambda: qwen_edit_embeds(7)),
    replace(QWEN_EDIT, name="qwen-image-edit-2511", build=lambda: build_qwen_edit(zero_cond_t=True)),
    replace(QWEN, name="qwen-image, 7 text tokens", embeds=lambda: qwen_embeds(7)),
    Z_IMAGE,
    replace(Z_IMAGE, name="z-image, prompts of 40 and 8 tokens", embeds=lambda: z_image_embeds(40)),
    LUMINA2,
    replace(LUMINA2, name="lumina2, 7 text tokens", embeds=lambda: lumina2_embeds(7)),
    KREA2,
    replace(KREA2, name="krea2, 7 text tokens", embeds=lambda: krea2_embeds(7)),
)
