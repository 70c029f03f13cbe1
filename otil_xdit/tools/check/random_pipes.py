"""Pipelines round networks of published size with random weights: steps take their real time, images show nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from otil_xdit.catalog.models import published_networks
from otil_xdit.dryrun.networks import find_network

SEED = 0
"""Of weights and prompts; the same on every rank."""

SIZE = 1024
"""Pixels a side."""

TEXT_TOKENS = {"SDXL": 77, "FLUX": 512}

_SPARE = 1.3
"""Times the weights' memory, for activations and what the exchange keeps."""

_SPARE_BYTES = 4 * 10**9


class Subject(NamedTuple):
    """A pipeline on this rank's device, and the arguments of its call besides steps and callbacks."""

    pipe: Any
    call: dict[str, Any]


def memory_needed(label: str, dtype: torch.dtype) -> float:
    """Return the bytes that a rank of a published network wants, roughly."""
    count = sum(weight.numel() for weight in find_network(label).module.parameters())
    return _SPARE * count * dtype.itemsize + _SPARE_BYTES


def random_subject(label: str, dtype: torch.dtype, device: torch.device) -> Subject:
    """Return a published network's pipeline, one of `BUILDERS`."""
    record = published_networks()[label].network
    assert record is not None, "published networks have one"
    network = make_network(record.kind, dict(record.settings), dtype, device)
    return BUILDERS[label](network, TEXT_TOKENS[label], SIZE)


def make_network(kind: str, settings: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Return a network of diffusers in eval mode, made where it is to be: large ones do not fit the host twice."""
    usual = torch.get_default_dtype()
    torch.manual_seed(SEED)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return getattr(importlib.import_module("diffusers"), kind)(**settings).eval()
    finally:
        torch.set_default_dtype(usual)


def sdxl_subject(unet: Any, tokens: int, size: int) -> Subject:
    """Return SDXL's pipeline round a U-Net.

    Args:
        unet: with SDXL's text and time conditions.
        tokens: of the prompt.
        size: pixels a side.
    """
    diffusers = importlib.import_module("diffusers")
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = diffusers.EulerDiscreteScheduler()
    pipe = diffusers.StableDiffusionXLPipeline(vae=_vae(unet), unet=unet, scheduler=scheduler, **parts)
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    shapes = 2 * ((1, tokens, config.cross_attention_dim),) + 2 * ((1, pooled),)
    return Subject(pipe, {**_embeds(unet, dict(zip(names, shapes, strict=True))), **_call(size), "guidance_scale": 5.0})


def flux_subject(transformer: Any, tokens: int, size: int) -> Subject:
    """Return FLUX's pipeline round a transformer; arguments as `sdxl_subject`'s."""
    diffusers = importlib.import_module("diffusers")
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler=scheduler, vae=_vae(transformer), transformer=transformer, **parts)
    config = transformer.config
    shapes = {
        "prompt_embeds": (1, tokens, config.joint_attention_dim),
        "pooled_prompt_embeds": (1, config.pooled_projection_dim),
    }
    return Subject(pipe, {**_embeds(transformer, shapes), **_call(size), "guidance_scale": 3.5})


BUILDERS: dict[str, Callable[[Any, int, int], Subject]] = {"SDXL": sdxl_subject, "FLUX": flux_subject}
"""By the label of a published network: what makes a pipeline round it."""


def _embeds(network: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return {
        name: torch.randn(shape, generator=generator).to(network.device, network.dtype)
        for name, shape in shapes.items()
    }


def _call(size: int) -> dict[str, Any]:
    return {"height": size, "width": size, "output_type": "latent"}


def _vae(network: Any) -> Any:
    """Return a VAE of the usual eight pixels a side, which nothing is decoded with."""
    levels = 4
    vae = importlib.import_module("diffusers").AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=0.0,
    )
    return vae.to(network.device, network.dtype)
