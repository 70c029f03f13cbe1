"""What the exchange's copies will take on a rank, said before the first picture; `otil-xdit memory` tells more."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from otil_xdit.dryrun.memory import memory_of
from otil_xdit.dryrun.networks import META, T5_TOKENS, Network, layers_in_order
from otil_xdit.dryrun.requests import Job, ParallelDegrees
from otil_xdit.dryrun.traffic import Traffic
from otil_xdit.method.config import OtilConfig

logger = logging.getLogger("otil_xdit")

DITS = {
    "SD3Transformer2DModel": (2, 77 + T5_TOKENS, 2),
    "PixArtTransformer2DModel": (2, 0, 2),
    "FluxTransformer2DModel": (2, 512, 1),
}
"""Latent pixels of a token a side, text tokens in self-attention by diffusers' defaults, and passes under guidance."""

_STEPS = 30
"""Of the picture: enough for every kind of step that the settings have."""


def tell_footprint(pipe: Any, config: Any, patches: int, ulysses_degree: int, cfg_degree: int) -> None:
    """Log at INFO what the exchange will take in a picture of the pipeline's own size, or that it is unknown.

    From a run on "meta" tensors, which takes a fraction of a second (some seconds for SDXL's U-Net), and none where
    nobody listens.

    Args:
        pipe: the diffusers pipeline, before xDiT wraps it.
        config: the strategy's; other than `OtilConfig` says nothing of memory.
        patches, ulysses_degree, cfg_degree: how the ranks share the picture.
    """
    if not (logger.isEnabledFor(logging.INFO) and isinstance(config, OtilConfig)):
        return
    try:
        size, bytes_of_rank = footprint(pipe, config, patches, ulysses_degree, cfg_degree)
    except Exception as error:  # of whatever a pipeline that nobody has seen lacks: no picture may fail for a log line
        logger.info("what the exchange's copies will take is not known for %s (%s)", type(pipe).__name__, error)
        return
    logger.info(
        "the exchange's copies will take about %.1f MB on each rank for a picture of %d x %d pixels; "
        "--otil_kv_cache_dtype small takes less",
        bytes_of_rank / 1e6,
        *size,
    )


def footprint(
    pipe: Any, config: OtilConfig, patches: int, ulysses_degree: int, cfg_degree: int
) -> tuple[tuple[int, int], int]:
    """A pipeline's own height and width in pixels, and the bytes of all the exchange's buffers in one picture of it.

    Raises:
        AttributeError, RuntimeError, TypeError, ValueError: where the pipeline does not tell what is needed.
    """
    unet = getattr(pipe, "unet", None)
    module = pipe.transformer if unet is None else unet
    sample = module.config.get("sample_size") or pipe.default_sample_size
    rows, cols = sample if isinstance(sample, (list, tuple)) else (sample, sample)
    height, width = rows * pipe.vae_scale_factor, cols * pipe.vae_scale_factor
    composition = ParallelDegrees(cfg_degree, ulysses_degree, patches)
    taken = _of_dit if unet is None else _of_unet
    return (height, width), taken(pipe, height, width, composition, config)


def _of_unet(pipe: Any, height: int, width: int, composition: ParallelDegrees, config: OtilConfig) -> int:
    """Bytes of copies, payloads, halo rows, moments and rooms."""
    settings = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    with META:
        module = type(pipe.unet)(**settings)
    network = Network(type(pipe).__name__, module, pipe.vae_scale_factor)
    job = Job(network, height, width, network.batch, pipe.unet.dtype, network.text)
    # Which layers wait under a tolerance depends on the picture; that they may takes a number for each layer.
    return Traffic(job, composition).of_run(config.replace(tolerance=0.0), _STEPS).buffer_bytes


def _of_dit(pipe: Any, height: int, width: int, composition: ParallelDegrees, config: OtilConfig) -> int:
    """Bytes of copies, payloads and rooms."""
    kind = type(pipe.transformer).__name__
    if kind not in DITS:
        raise ValueError(f"how much text {kind} is given is not known")
    patch, text, passes = DITS[kind]
    network = Network(type(pipe).__name__, pipe.transformer, pipe.vae_scale_factor, patch)
    degree = composition.ulysses
    layers = [
        replace(layer, width=layer.width // degree, heads=layer.heads // degree)
        for layer in layers_in_order(network, height, width, composition.patches, text)
    ]
    batch = 1 if composition.cfg > 1 else passes
    memory = memory_of(layers, composition.patches, batch, pipe.transformer.dtype, config)
    return memory.total + sum(memory.rooms.values())
