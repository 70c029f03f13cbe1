"""Size of the exchange's buffers on a rank, logged before the first image; `otil-xdit memory` tells more."""

from __future__ import annotations

import logging
from typing import Any

from otil_xdit.catalog.models import published_networks
from otil_xdit.dryrun.job import Job, ParallelDegrees
from otil_xdit.dryrun.networks import META, Network
from otil_xdit.dryrun.traffic import Traffic
from otil_xdit.method.config import OtilConfig
from otil_xdit.networks.unet.model import is_unet
from otil_xdit.runtime.network_hooks import controlnets_of

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
        "--otil_kv_cache_dtype float8 takes less in float32",
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
    job = job_of(pipe)
    degrees = ParallelDegrees(cfg_degree, ulysses_degree, patches)
    # Which layers wait under a tolerance depends on the image; that they may takes a number for each layer.
    traffic = Traffic(job, degrees).of_run(config.replace(tolerance=0.0), _STEPS)
    return (job.height, job.width), traffic.buffer_bytes


def job_of(pipe: Any) -> Job:
    """Return a step of an image of a pipeline's own size, by its network without weights.

    Raises:
        AttributeError, TypeError, ValueError: where the pipeline does not tell what is needed.
    """
    module = pipe.transformer if getattr(pipe, "unet", None) is None else pipe.unet
    sample = module.config.get("sample_size") or pipe.default_sample_size
    rows, cols = sample if isinstance(sample, (list, tuple)) else (sample, sample)
    height, width = rows * pipe.vae_scale_factor, cols * pipe.vae_scale_factor
    network = _network_of(pipe, module)
    return Job(network, height, width, network.batch, module.dtype, network.text)


def _network_of(pipe: Any, module: Any) -> Network:
    """Return a pipeline's network without its weights.

    Raises:
        ValueError: for a DiT that no record describes.
    """
    empty = _without_weights(module)
    if is_unet(module):
        controls = {name: _without_weights(control) for name, control in controlnets_of(pipe).items()}
        return Network(type(pipe).__name__, empty, pipe.vae_scale_factor, controls=controls)
    kind = type(module).__name__
    record = next((one for one in published_networks().values() if one.network and one.network.kind == kind), None)
    if record is None or record.network is None:
        raise ValueError(f"how much text {kind} is given is not known")
    facts = record.network
    return Network(type(pipe).__name__, empty, pipe.vae_scale_factor, record.patch, facts.passes, facts.text_tokens)


def _without_weights(module: Any) -> Any:
    with META:
        return type(module)(**{name: value for name, value in module.config.items() if not name.startswith("_")})
