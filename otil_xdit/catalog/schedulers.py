"""`--scheduler NAME`: another diffusers scheduler for a U-Net pipeline, made from the settings of its own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
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


BY_THE_VALUE = (
    "CogVideoXDDIMScheduler",
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers that draw no noise and step each value of a latent by itself, unless a setting says otherwise."""

_WHOLE_SETTINGS = ("thresholding", "use_dynamic_thresholding")
"""Settings with which such a scheduler looks at the whole latent."""


def _inner(scheduler: Any) -> tuple[Any, Mapping[str, Any]]:
    """Return the scheduler of diffusers that xDiT may have wrapped, and its settings."""
    inner = getattr(scheduler, "module", scheduler)
    return inner, getattr(inner, "config", {})


def draws_noise(scheduler: Any, arguments: Mapping[str, Any]) -> bool:
    """Tell whether a scheduler adds noise to the latent at every step; unknown ones count as such.

    Args:
        scheduler: of diffusers, or xDiT's wrapper of one.
        arguments: what else than tensors its `step` is called with, by name.
    """
    inner, config = _inner(scheduler)
    stochastic = config.get("stochastic_sampling") or str(config.get("algorithm_type", "")).startswith("sde")
    asked = any(arguments.get(name) for name in ("eta", "s_churn"))
    return type(inner).__name__ not in BY_THE_VALUE or bool(stochastic) or asked


def steps_by_the_value(scheduler: Any, arguments: Mapping[str, Any]) -> bool:
    """Tell whether stepping a part of a latent gives that part of the stepped latent.

    Schedulers that draw noise would draw the same for every part.

    Args:
        scheduler, arguments: as for `draws_noise`.
    """
    _, config = _inner(scheduler)
    return not draws_noise(scheduler, arguments) and not any(config.get(name) for name in _WHOLE_SETTINGS)


def scheduler_name(text: str) -> str:
    """`text` if it is a known name; raises `ValueError` naming all otherwise."""
    if text not in SCHEDULERS:
        raise ValueError(f"{text!r} is not a scheduler; choose from {', '.join(SCHEDULERS)}")
    return text


def make_scheduler(name: str, old: Any) -> Any:
    """The scheduler of that name with the noise schedule, prediction type and timestep spacing of `old`."""
    kind = getattr(importlib.import_module("diffusers"), SCHEDULERS[scheduler_name(name)])
    return kind.from_config({**LATENT_DEFAULTS, **old.config}, **SETTINGS.get(name, {}))
