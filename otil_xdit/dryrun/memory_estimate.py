"""Size of the exchange's buffers on a rank, logged before the first image; `otil-xdit memory` tells more."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from otil_xdit.catalog.models import published_networks
from otil_xdit.dryrun.job import Job, ParallelDegrees
from otil_xdit.dryrun.memory import memory_of
from otil_xdit.dryrun.networks import META, Network, layers_in_order
from otil_xdit.dryrun.traffic import Traffic
from otil_xdit.method.config import OtilConfig

logger = logging.getLogger("otil_xdit")

_STEPS = 30
"""Of the image: enough for every kind of step that the settings have."""


def log_memory_estimate(pipe: Any, config: Any, patches: int, ulysses_degree: int, cfg_degree: int) -> None:
    """Log at INFO how much the exchange will take in an image of the pipeline's own size, or that it is unknown.

    It comes from a run on "meta" tensors, which takes a fraction of a second (some seconds for SDXL's U-Net). Nothing
    is run where nobody listens.

    Args:
        pipe: the diffusers pipeline, before xDiT wraps it.
        config: the strategy's; one that is not an `OtilConfig` says nothing of memory.
        patches, ulysses_degree, cfg_degree: how the ranks share the image.
    """
    if not (logger.isEnabledFor(logging.INFO) and isinstance(config, OtilConfig)):
        return
    try:
        size, bytes_of_rank = estimate_memory(pipe, config, patches, ulysses_degree, cfg_degree)
    except Exception as error:  # of whatever a pipeline that nobody has seen lacks: no image may fail for a log line
        logger.info("what the exchange's copies will take is not known for %s (%s)", type(pipe).__name__, error)
        return
    logger.info(
        "the exchange's copies will take about %.1f MB on each rank for an image of %d x %d pixels; "
        "--otil_kv_cache_dtype float8 takes less",
        bytes_of_rank / 1e6,
        *size,
    )


def estimate_memory(
    pipe: Any, config: OtilConfig, patches: int, ulysses_degree: int, cfg_degree: int
) -> tuple[tuple[int, int], int]:
    """Return a pipeline's own height and width in pixels, and the bytes of all the exchange's buffers in such an image.

    Args:
        pipe: the diffusers pipeline.
        config: the settings.
        patches, ulysses_degree, cfg_degree: how the ranks share the image.

    Raises:
        AttributeError, RuntimeError, TypeError, ValueError: where the pipeline does not tell what is needed.
    """
    unet = getattr(pipe, "unet", None)
    module = pipe.transformer if unet is None else unet
    sample = module.config.get("sample_size") or pipe.default_sample_size
    rows, cols = sample if isinstance(sample, (list, tuple)) else (sample, sample)
    height, width = rows * pipe.vae_scale_factor, cols * pipe.vae_scale_factor
    degrees = ParallelDegrees(cfg_degree, ulysses_degree, patches)
    estimate = _estimate_dit if unet is None else _estimate_unet
    return (height, width), estimate(pipe, height, width, degrees, config)


def _estimate_unet(pipe: Any, height: int, width: int, degrees: ParallelDegrees, config: OtilConfig) -> int:
    """Return the bytes of copies, payloads, halo rows, moments and scratch buffers."""
    settings = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    with META:
        module = type(pipe.unet)(**settings)
    network = Network(type(pipe).__name__, module, pipe.vae_scale_factor)
    job = Job(network, height, width, network.batch, pipe.unet.dtype, network.text)
    # Which layers wait under a tolerance depends on the image; that they may takes a number for each layer.
    return Traffic(job, degrees).of_run(config.replace(tolerance=0.0), _STEPS).buffer_bytes


def _estimate_dit(pipe: Any, height: int, width: int, degrees: ParallelDegrees, config: OtilConfig) -> int:
    """Return the bytes of copies, payloads and scratch buffers."""
    kind = type(pipe.transformer).__name__
    record = next((one for one in published_networks().values() if one.network and one.network.kind == kind), None)
    if record is None or record.network is None:
        raise ValueError(f"how much text {kind} is given is not known")
    network = Network(type(pipe).__name__, pipe.transformer, pipe.vae_scale_factor, record.patch)
    layers = [
        replace(layer, width=layer.width // degrees.ulysses, heads=layer.heads // degrees.ulysses)
        for layer in layers_in_order(network, height, width, degrees.patches, record.network.text_tokens)
    ]
    batch = 1 if degrees.cfg > 1 else record.network.passes
    memory = memory_of(layers, degrees.patches, batch, pipe.transformer.dtype, config)
    return memory.total + sum(memory.scratch.values())
