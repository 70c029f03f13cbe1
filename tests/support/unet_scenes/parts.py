"""The parts of small Stable Diffusion pipelines, made offline: tiny-dit's text encoders and VAE, random U-Nets."""

from __future__ import annotations

from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.support.dits.weights import noise, seeded
from tests.support.unets.configs import CONFIGS, TIME_IDS_WIDTH

MODEL = Path(__file__).resolve().parents[3] / "otil_xdit" / "weights" / "tiny-dit"
INIT = {"sharpness": 1.0, "norm_weight": 1.0}
"""Of random weights; gentler than in `tests.support.unets`, for guided steps amplify every rounding."""
TEXT_WIDTH = 64
SIZE = 96
"""Pixels a side; the VAE makes 24 latent pixels of them, so that SD1.5's lowest level has 3 rows to share."""


def unet(case: str, **changes: Any) -> UNet2DConditionModel:
    """A U-Net of `tests.support.unets` for the width of these text encoders."""
    config = {**CONFIGS[case], "sample_size": SIZE // 4, "cross_attention_dim": TEXT_WIDTH, **changes}
    if config.get("addition_embed_type") == "text_time":
        ids = 5 if case == "refiner" else 6
        config["projection_class_embeddings_input_dim"] = ids * TIME_IDS_WIDTH + TEXT_WIDTH
        config["cross_attention_dim"] = TEXT_WIDTH if case == "refiner" else 2 * TEXT_WIDTH
    made = seeded(UNet2DConditionModel(**config), **INIT)
    assert isinstance(made, UNet2DConditionModel)
    return made


def controlnet(network: UNet2DConditionModel, seed: int = 0) -> ControlNetModel:
    """A ControlNet for `network` whose residuals are about as large as what they are added to."""
    made = ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(8, 16, 16))
    seeded(made, **INIT)
    with torch.no_grad():
        for parameter in made.controlnet_mid_block.parameters():
            parameter.mul_(1 + seed)  # so that two ControlNets differ
    return made


@cache
def _folder_parts() -> dict[str, Any]:
    vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32)
    vae.register_to_config(shift_factor=None)  # which Stable Diffusion's pipelines ignore
    return {
        "vae": vae,
        "tokenizer": CLIPTokenizer.from_pretrained(MODEL / "tokenizer"),
        "text_encoder": CLIPTextModel.from_pretrained(MODEL / "text_encoder", dtype=torch.float32),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(MODEL / "text_encoder_2", dtype=torch.float32),
    }


def scheduler() -> DDIMScheduler:
    # Saturated values would hide differences, so no clipping; with velocities an untrained network stays in range.
    return DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, prediction_type="v_prediction"
    )


def pipeline(kind: type[DiffusionPipeline], case: str = "sd1.5", **parts: Any) -> Any:
    """A pipeline of that class round the U-Net of that case."""
    shared = _folder_parts()
    made = {name: shared[name] for name in ("vae", "tokenizer", "text_encoder")}
    made |= {"unet": unet(case), "scheduler": scheduler()}
    if "StableDiffusionXL" in kind.__name__:
        made |= {"text_encoder_2": shared["text_encoder_2"], "tokenizer_2": shared["tokenizer"]}
        if case == "refiner":
            made |= {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    else:
        parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, **parts}
    known = signature(kind.__init__).parameters
    pipe = kind(**{name: part for name, part in {**made, **parts}.items() if name in known})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(seed: int = 1) -> torch.Tensor:
    """A soft random image, [1, 3, SIZE, SIZE] in 0..1."""
    coarse = noise(1, 3, SIZE // 16, SIZE // 16, seed=seed)
    return torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear").sigmoid()


def mask() -> torch.Tensor:
    """What is painted anew: the image's right lower quarter and a bit more, [1, 1, SIZE, SIZE]."""
    made = torch.zeros(1, 1, SIZE, SIZE)
    made[..., 50:, 40:] = 1.0
    return made
