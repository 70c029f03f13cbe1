"""A call of a denoising network on "meta", and the floating-point operations of one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from otil_xdit.dryrun.job import Job
from otil_xdit.dryrun.networks import META
from otil_xdit.networks.dit.architectures import architecture_of
from otil_xdit.networks.unet.controlnet import scale_and_reach


def flops_of(job: Job) -> int:
    """Count one process's step: two for each multiplication and addition of matrix products and convolutions.

    Raises:
        ValueError: for networks whose call is not known here.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call_network(job, call_controls(job))
    return int(counter.get_total_flops())


def call_controls(job: Job) -> dict[str, Any]:
    """Call a job's ControlNets, and return what the U-Net is to be given of them, by name."""
    found: dict[str, Any] = {}
    for control in job.cast_controls():
        scale, _ = scale_and_reach(control.controlnet_cond_embedding)
        condition = _empty(job, job.batch, control.config.conditioning_channels, *(scale * side for side in job.latent))
        residuals, middle = control(*_inputs(job), **conditions_of(job), controlnet_cond=condition, return_dict=False)
        found = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": middle}
    return found  # those of several are added up, and of one shape


def arguments_of(job: Job) -> dict[str, Any]:
    """Return what a job's network is called with, by name: tensors without storage.

    Raises:
        ValueError: for networks whose call is not known here.
    """
    latent, times = _inputs(job)
    name = "sample" if job.network.is_unet else "hidden_states"
    return {name: latent, "timestep": times, **conditions_of(job)}


def call_network(job: Job, residuals: Mapping[str, Any]) -> None:
    """Call a job's network with everything that it is to be given.

    Args:
        job: whose network it is.
        residuals: as `call_controls` gives them.

    Raises:
        ValueError: for networks whose call is not known here.
    """
    job.cast_network()(return_dict=False, **arguments_of(job), **residuals)


def _inputs(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latent and times of all images."""
    rows, cols = job.latent
    channels = job.network.module.config.in_channels
    shape: tuple[int, ...] = (job.batch, channels, rows, cols)
    if not job.network.is_unet and not architecture_of(job.network.module).rows:  # its tokens are packed
        shape = (job.batch, rows * cols // job.network.patch**2, channels)
    return _empty(job, *shape), torch.empty((job.batch,), device=META)


def conditions_of(job: Job) -> dict[str, Any]:
    """Return what a network is given besides latent and time, by name.

    Raises:
        ValueError: for networks whose call is not known here.
    """
    module, batch, text = job.network.module, job.batch, (job.batch, job.text)
    config = module.config
    match "U-Net" if job.network.is_unet else type(module).__name__:
        case "U-Net":
            return {
                "encoder_hidden_states": _empty(job, *text, config.cross_attention_dim),
                "added_cond_kwargs": _sdxl_conditions(job),
            }
        case "SD3Transformer2DModel":
            return {
                "encoder_hidden_states": _empty(job, *text, config.joint_attention_dim),
                "pooled_projections": _empty(job, batch, config.pooled_projection_dim),
            }
        case "FluxTransformer2DModel":
            rows, cols = job.latent
            return {
                "encoder_hidden_states": _empty(job, *text, config.joint_attention_dim),
                "pooled_projections": _empty(job, batch, config.pooled_projection_dim),
                "img_ids": torch.empty(rows * cols // job.network.patch**2, 3, device=META),
                "txt_ids": torch.empty(job.text, 3, device=META),
                "guidance": torch.empty(batch, device=META) if config.guidance_embeds else None,
            }
        case "PixArtTransformer2DModel":
            return {
                "encoder_hidden_states": _empty(job, *text, config.caption_channels),
                "added_cond_kwargs": {"resolution": _empty(job, batch, 2), "aspect_ratio": _empty(job, batch, 1)},
            }
    unknown = f"how {job.network.name} is called is not known here"
    raise ValueError(f"{unknown}; give --step_time in place of --flops or --card")


def _sdxl_conditions(job: Job) -> dict[str, torch.Tensor]:
    """Return SDXL's pooled text and its sizes; of other U-Nets nothing."""
    config = job.network.module.config
    if config.addition_embed_type != "text_time":
        return {}
    features, width = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    ids = 5 if (features - 5 * width) % width else 6  # a refiner has 5
    return {
        "text_embeds": _empty(job, job.batch, features - ids * width),
        "time_ids": _empty(job, job.batch, ids),
    }


def _empty(job: Job, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=job.dtype, device=META)
