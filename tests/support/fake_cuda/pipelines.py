"""Pipelines for fake tensors: tiny ones of each architecture, and published ones at their size, without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import diffusers
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
)
from torch._subclasses.fake_tensor import unset_fake_temporarily

from otil_xdit.catalog.models import published_networks
from tests.support.dits.packed import build_flux, flux_embeds, tiny_vae
from tests.support.dits.rows import build_sd3, sd3_embeds
from tests.support.dits.weights import noise
from tests.support.unets.configs import SDXL
from tests.support.unets.pipelines import pipeline_around


@dataclass(frozen=True)
class Made:
    """A pipeline, and what it is called with.

    Attributes:
        arguments: of tensors the shape alone counts.
    """

    pipe: Any
    arguments: dict[str, Any]

    def call(self, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """Return the arguments of a call whose result is the latent."""

        def placed(value: Any) -> Any:
            return torch.empty(value.shape, dtype=dtype, device=device) if isinstance(value, torch.Tensor) else value

        named = {name: placed(value) for name, value in self.arguments.items()}
        return {"prompt": None, "output_type": "latent", "generator": torch.Generator().manual_seed(0), **named}


def _unet(unet: Any, size: tuple[int, int]) -> Made:
    pipe = pipeline_around(unet)
    pipe.scheduler = _from_the_start(EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading"), "timesteps")
    width, pooled = unet.config.cross_attention_dim, None
    arguments = {"prompt_embeds": noise(1, 77, width, seed=1), "negative_prompt_embeds": noise(1, 77, width, seed=2)}
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        arguments["pooled_prompt_embeds"] = noise(1, pooled, seed=3)
        arguments["negative_pooled_prompt_embeds"] = noise(1, pooled, seed=4)
    return _quiet(pipe, {**arguments, "height": 8 * size[0], "width": 8 * size[1], "guidance_scale": 5.0})


def _shallow() -> UNet2DConditionModel:
    """Return SDXL's topology with one of each layer in a row, which every kind of exchange needs no more of."""
    with torch.device("meta"):
        return UNet2DConditionModel(**{**SDXL, "layers_per_block": 1, "transformer_layers_per_block": 1}).eval()


def _dit(pipe: Any, arguments: dict[str, Any], size: int, guidance: float) -> Made:
    pipe.scheduler = _from_the_start(pipe.scheduler, "timesteps", "sigmas")
    return _quiet(pipe, {**arguments, "height": size, "width": size, "guidance_scale": guidance})


def _quiet(pipe: Any, arguments: dict[str, Any]) -> Made:
    pipe.set_progress_bar_config(disable=True)
    return Made(pipe, arguments)


def _from_the_start(scheduler: Any, *on_device: str) -> Any:
    """Let a scheduler make its timesteps from real numbers, and spare it the search for the first one.

    Args:
        on_device: what it then has on the device.
    """
    set_timesteps = scheduler.set_timesteps

    @wraps(set_timesteps)
    def set_and_begin(num_inference_steps: int | None = None, device: Any = None, **kwargs: Any) -> None:
        with unset_fake_temporarily():
            set_timesteps(num_inference_steps, "cpu", **kwargs)
        for name in on_device:
            tensor = getattr(scheduler, name)
            setattr(scheduler, name, torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
        scheduler.set_begin_index(0)

    scheduler.set_timesteps = set_and_begin
    return scheduler


def _published(name: str) -> Any:
    record = published_networks()[name].network
    assert record is not None, "published networks have one"
    with torch.device("meta"):
        return getattr(diffusers, record.kind)(**dict(record.settings)).eval()


def _published_sd3() -> Made:
    transformer = _published("SD3")
    config = transformer.config
    encoders = dict.fromkeys(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    pipe = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_vae(), **encoders)
    words = {
        f"{sign}{part}": torch.empty(1, *size)
        for sign in ("", "negative_")
        for part, size in (
            ("prompt_embeds", (333, config.joint_attention_dim)),
            ("pooled_prompt_embeds", (config.pooled_projection_dim,)),
        )
    }
    return _dit(pipe, words, 1024, 7.0)


def _published_flux() -> Made:
    transformer = _published("FLUX")
    config = transformer.config
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipe = FluxPipeline(scheduler, tiny_vae(), None, None, None, None, transformer)
    words = {
        "prompt_embeds": torch.empty(1, 512, config.joint_attention_dim),
        "pooled_prompt_embeds": torch.empty(1, config.pooled_projection_dim),
    }
    return _dit(pipe, words, 1024, 3.5)


PIPELINES: dict[str, Callable[[], Made]] = {
    "sdxl": lambda: _unet(_shallow(), (44, 32)),
    "sd3": lambda: _dit(build_sd3(), sd3_embeds(), 192, 7.0),
    "flux": lambda: _dit(build_flux(), flux_embeds(144), 192, 3.5),
    "SDXL": lambda: _unet(_published("SDXL"), (128, 128)),
    "SD3": _published_sd3,
    "FLUX": _published_flux,
}
"""In small letters with few layers and channels; in capitals as published, at 1024 x 1024 pixels."""
