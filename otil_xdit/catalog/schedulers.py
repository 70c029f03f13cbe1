"""`--scheduler NAME`: another diffusers scheduler for a U-Net pipeline, made from the settings of its own."""

from __future__ import annotations

import importlib
from typing import Any

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm-solver": "DPMSolverMultistepScheduler",
    "dpm-solver-sde": "DPMSolverMultistepScheduler",
    "dpm-solver-single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2-a": "KDPM2AncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "tcd": "TCDScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""By the name that ``--scheduler`` takes. Those that need scipy or torchsde are left out."""

SETTINGS = {"dpm-solver-sde": {"algorithm_type": "sde-dpmsolver++"}}
"""What makes a name differ from another of the same class, whatever the old scheduler says. Noise is drawn by the
pipeline's generator, which diffusers hands to `step`, or from torch's own, so it is the same on all ranks."""

LATENT_DEFAULTS = {"clip_sample": False, "skip_prk_steps": True}
"""What these settings are for latents, where the old scheduler does not know them; diffusers' own defaults are for
pixels in [-1, 1]."""


def scheduler_name(text: str) -> str:
    """`text` if it is a known name; raises `ValueError` naming all otherwise."""
    if text not in SCHEDULERS:
        raise ValueError(f"{text!r} is not a scheduler; choose from {', '.join(SCHEDULERS)}")
    return text


def make_scheduler(name: str, old: Any) -> Any:
    """The scheduler of that name with the noise schedule, prediction type and timestep spacing of `old`."""
    kind = getattr(importlib.import_module("diffusers"), SCHEDULERS[scheduler_name(name)])
    return kind.from_config({**LATENT_DEFAULTS, **old.config}, **SETTINGS.get(name, {}))
