"""Floating-point operations of one step, counted on "meta"."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from otil_xdit.dryrun.job import Job
from otil_xdit.dryrun.networks import META
from otil_xdit.dryrun.requests import call_unet


def flops_of(job: Job) -> int:
    """Count one process's step: two for each multiplication and addition of matrix products and convolutions.

    Raises:
        ValueError: for networks whose call is not known here.
    """
    call = call_of(job)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(job)
    return int(counter.get_total_flops())


def call_of(job: Job) -> Callable[[Job], None]:
    """Return the function that calls a job's network, on "meta".

    Raises:
        ValueError: for networks whose call is not known here.
    """
    call = call_unet if job.network.is_unet else _CALLS.get(type(job.network.module).__name__)
    if call is None:
        raise ValueError(f"how {job.network.name} is called is not known here; give --step_time in place of --flops")
    return call


def _tensor(job: Job, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=job.dtype, device=META)


def _call_sd3(job: Job) -> None:
    network, config = job.cast_network(), job.network.module.config
    network(
        _tensor(job, job.batch, config.in_channels, *job.latent),
        _tensor(job, job.batch, job.text, config.joint_attention_dim),
        _tensor(job, job.batch, config.pooled_projection_dim),
        torch.empty(job.batch, device=META),
    )


def _call_flux(job: Job) -> None:
    network, config = job.cast_network(), job.network.module.config
    rows, cols = job.latent
    tokens = rows * cols // job.network.patch**2
    network(
        _tensor(job, job.batch, tokens, config.in_channels),
        encoder_hidden_states=_tensor(job, job.batch, job.text, config.joint_attention_dim),
        pooled_projections=_tensor(job, job.batch, config.pooled_projection_dim),
        timestep=torch.empty(job.batch, device=META),
        img_ids=torch.empty(tokens, 3, device=META),
        txt_ids=torch.empty(job.text, 3, device=META),
        guidance=torch.empty(job.batch, device=META) if config.guidance_embeds else None,
    )


def _call_pixart(job: Job) -> None:
    network, config = job.cast_network(), job.network.module.config
    network(
        _tensor(job, job.batch, config.in_channels, *job.latent),
        encoder_hidden_states=_tensor(job, job.batch, job.text, config.caption_channels),
        timestep=torch.empty(job.batch, device=META),
        added_cond_kwargs={"resolution": _tensor(job, job.batch, 2), "aspect_ratio": _tensor(job, job.batch, 1)},
    )


_CALLS = {
    "SD3Transformer2DModel": _call_sd3,
    "FluxTransformer2DModel": _call_flux,
    "PixArtTransformer2DModel": _call_pixart,
}
"""By the class that diffusers gives a DiT."""
