"""The latents of a generation, step by step: what the network was called with and the clean image that it predicted.

Plain diffusers in one process; nothing here knows about ranks.

Shapes: n denoising steps, C latent channels, h x w latent pixels, H x W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from otil_xdit.catalog.bundled import model_folder
from otil_xdit.catalog.folders import OWN, load_pipe
from otil_xdit.catalog.schedulers import SCHEDULERS
from otil_xdit.tools.eval.matrix import PROMPTS

VARIANCE_PRESERVING = ("ddim", "ddpm", "deis", "dpm-solver", "dpm-solver-single", "unipc")
"""Samplers whose latent is sqrt(a) * clean + sqrt(1 - a) * noise, a from the table of the training noise levels."""

SAMPLERS = ("own", *VARIANCE_PRESERVING, "euler", "euler-a")
"""What `load` takes: samplers with one call of the network a step, from which the clean latent can be computed."""

FLOW = "FlowMatchEulerDiscreteScheduler"


@dataclass(frozen=True)
class Trajectory:
    """One image on its way.

    Attributes:
        latents: what the network was called with at each step, float32 [n, C, h, w].
        clean: the clean latent that it predicted there, float32 [n, C, h, w].
        pixels: the same decoded, float32 [n, 3, H, W] in 0..1.
    """

    latents: torch.Tensor
    clean: torch.Tensor
    pixels: torch.Tensor


def read_prompts(count: int) -> list[str]:
    """Return the first `count` of the prompts that ship with `otil-xdit eval`.

    Raises:
        ValueError: when there are fewer.
    """
    prompts = PROMPTS.read_text().splitlines()
    if not 1 <= count <= len(prompts):
        raise ValueError(f"--prompts is {count}; {PROMPTS.name} has 1 to {len(prompts)}")
    return prompts[:count]


def sampler_of(model: str, sampler: str) -> str:
    """The class name of the diffusers scheduler that `model` will sample with; a DiT always has its own.

    Raises:
        ValueError: for a model that is neither shipped nor a folder in diffusers format, and for a sampler whose clean
            latent is not known.
    """
    index = _folder(model) / "model_index.json"
    if not index.is_file():
        shipped = ", ".join(sorted(path.name for path in Path(model_folder("")).iterdir() if path.is_dir()))
        raise ValueError(f"--models {model}: neither a folder in diffusers format nor one of {shipped}")
    if sampler not in SAMPLERS:
        raise ValueError(f"--sampler is {sampler!r}; choose from {', '.join(SAMPLERS)}")
    own = str(json.loads(index.read_text())["scheduler"][1])
    known = {SCHEDULERS[name] for name in SAMPLERS[1:]} | {FLOW}
    if sampler != "own" and own != FLOW:
        return SCHEDULERS[sampler]
    if own not in known:
        raise ValueError(f"--models {model}: its own sampler is {own}; give --sampler one of {', '.join(SAMPLERS[1:])}")
    return own


def latent_side(model: str, size: int) -> int:
    """Latent pixels a side of an image of `size` x `size`.

    Raises:
        ValueError: when the VAE cannot make that size.
    """
    config = json.loads((_folder(model) / "vae" / "config.json").read_text())
    scale = 2 ** (len(config["block_out_channels"]) - 1)
    if size < scale or size % scale:
        raise ValueError(f"--size is {size}; {model} makes multiples of {scale}")
    return int(size // scale)


def load(model: str, sampler: str) -> Any:
    """The diffusers pipeline of a shipped model or a folder, float32, with `sampler` in place of its own.

    A DiT (flow matching) keeps its own sampler.
    """
    return load_pipe(str(_folder(model)), OWN if sampler_of(model, sampler) == FLOW else sampler, None)


@torch.no_grad()
def generate(pipe: Any, prompt: str, seed: int, steps: int, guidance: float, size: int) -> Trajectory:
    """One image of `size` x `size` pixels, with everything that was seen on the way."""
    with recorded(pipe.scheduler) as seen:
        pipe(
            prompt,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        )
    latents, clean = (torch.cat(maps) for maps in zip(*seen, strict=True))
    return Trajectory(latents, clean, decode(pipe.vae, clean))


def decode(vae: Any, clean: torch.Tensor) -> torch.Tensor:
    """Latents [n, C, h, w] as the images that a viewer would see, [n, 3, H, W] in 0..1."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (vae.decode(clean / vae.config.scaling_factor + shift).sample / 2 + 0.5).clamp(0, 1)


def clean_latent(scheduler: Any, predicted: torch.Tensor, timestep: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """The clean latent in a network's prediction, all [1, C, h, w].

    Flow matching: x0 = x - sigma * v (Liu et al., 2023). Variance preserving: x0 = (x - sqrt(1 - a) * noise) / sqrt(a)
    (DDIM, equation 12), or for velocities sqrt(a) * x - sqrt(1 - a) * v (Salimans and Ho, 2022).

    Raises:
        ValueError: for another kind of prediction.
    """
    if type(scheduler).__name__ == FLOW:
        return latent - timestep / scheduler.config.num_train_timesteps * predicted
    kept = scheduler.alphas_cumprod[int(timestep)]
    signal, noise = kept.sqrt(), (1 - kept).sqrt()
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (latent - noise * predicted) / signal
    if kind == "v_prediction":
        return signal * latent - noise * predicted
    raise ValueError(f"the network predicts {kind!r}; the study knows epsilon, v_prediction and flow matching")


@contextmanager
def recorded(scheduler: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Collects (what the network was called with, the clean latent) of every step while it is open."""
    step, seen = scheduler.step, []

    # The pipelines look at the signature to see which arguments `step` takes; `wraps` shows them the old one.
    @wraps(step)
    def recording(
        predicted: torch.Tensor, timestep: torch.Tensor, latent: torch.Tensor, *rest: Any, **named: Any
    ) -> Any:
        called_with = scheduler.scale_model_input(latent, timestep) if _scales(scheduler) else latent
        wants_object = named.pop("return_dict", True)
        result = step(predicted, timestep, latent, *rest, return_dict=True, **named)
        clean = getattr(result, "pred_original_sample", None)
        if clean is None:
            clean = clean_latent(scheduler, predicted, timestep, latent)
        seen.append((called_with.clone(), clean.clone()))
        return result if wants_object else (result.prev_sample,)

    scheduler.step = recording
    try:
        yield seen
    finally:
        del scheduler.step


def _scales(scheduler: Any) -> bool:
    return hasattr(scheduler, "scale_model_input")


def _folder(model: str) -> Path:
    shipped = Path(model_folder(model))
    return shipped if shipped.is_dir() else Path(model)
