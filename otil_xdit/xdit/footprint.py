"""What the exchange's copies will take on a rank, said before the first picture; `otil-xdit memory` tells more."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from otil_xdit.config import OtilConfig
from otil_xdit.planner.memory import memory_of
from otil_xdit.planner.networks import T5_TOKENS, Network, layers_in_order

logger = logging.getLogger("otil_xdit")

DITS = {
    "SD3Transformer2DModel": (2, 77 + T5_TOKENS, 2),
    "PixArtTransformer2DModel": (2, 0, 2),
    "FluxTransformer2DModel": (2, 512, 1),
}
"""Latent pixels of a token a side, text tokens in self-attention by diffusers' defaults, and passes under guidance."""


def tell_footprint(pipe: Any, config: Any, patches: int, ulysses_degree: int, cfg_degree: int) -> None:
    """Log at INFO what keys and values will take in a picture of the pipeline's own size, or that it is unknown.

    From a run on "meta" tensors, which takes a fraction of a second, and none where nobody listens.

    Args:
        pipe: the diffusers pipeline, before xDiT wraps it.
        config: the strategy's; other than `OtilConfig` says nothing of memory.
        patches, ulysses_degree, cfg_degree: how the ranks share the picture.
    """
    if not (logger.isEnabledFor(logging.INFO) and isinstance(config, OtilConfig)):
        return
    try:
        size, bytes_of_rank = footprint(pipe, config, patches, ulysses_degree, cfg_degree)
    except (AttributeError, TypeError, ValueError) as error:
        logger.info("what the exchange's copies will take is not known for %s (%s)", type(pipe).__name__, error)
        return
    logger.info(
        "copies of keys and values will take about %.1f MB on each rank for a picture of %d x %d pixels; "
        "--otil_copies small takes less",
        bytes_of_rank / 1e6,
        *size,
    )


def footprint(
    pipe: Any, config: OtilConfig, patches: int, ulysses_degree: int, cfg_degree: int
) -> tuple[tuple[int, int], int]:
    """A pipeline's own height and width in pixels, and the bytes of copies, payloads and rooms in one picture of it.

    Raises:
        AttributeError, TypeError, ValueError: where the pipeline does not tell what is needed.
    """
    unet = getattr(pipe, "unet", None)
    module = pipe.transformer if unet is None else unet
    kind = type(module).__name__
    if unet is None and kind not in DITS:
        raise ValueError(f"how much text {kind} is given is not known")
    patch, text, passes = DITS[kind] if unet is None else (1, 0, 2)
    sample = module.config.get("sample_size") or pipe.default_sample_size
    rows, cols = sample if isinstance(sample, (list, tuple)) else (sample, sample)
    height, width = rows * pipe.vae_scale_factor, cols * pipe.vae_scale_factor
    network = Network(type(pipe).__name__, module, pipe.vae_scale_factor, patch)
    layers = [
        replace(layer, width=layer.width // ulysses_degree, heads=layer.heads // ulysses_degree)
        for layer in layers_in_order(network, height, width, patches, text)
    ]
    batch = 1 if cfg_degree > 1 else passes
    memory = memory_of(layers, patches, batch, module.dtype, config)
    return (height, width), memory.total + sum(memory.rooms.values())
