"""A small image of what is there after a step, on rank 0 alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from otil_xdit.serve.ranks.drawing import pixels_of
from otil_xdit.serve.requests import Pixels

LATENT_SIDE = 32
"""Latent pixels of a preview's longer side, at most: 256 image pixels with most VAEs, and quickly decoded."""


class Previews:
    """Decodes small copies of a latent, at steps spread evenly over the image.

    Args:
        count: of them.
        show: called with each.
    """

    def __init__(self, count: int, show: Callable[[Pixels], None]) -> None:
        self._count, self._show = count, show

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Be a ``callback_on_step_end`` that changes nothing."""
        latents, steps = tensors.get("latents"), int(pipe.num_timesteps)
        is_its_turn = (step + 1) * (self._count + 1) // steps > step * (self._count + 1) // steps
        if is_its_turn and step + 1 < steps and isinstance(latents, torch.Tensor) and latents.dim() == 4:
            self._show(decode_small(pipe, latents[:1]))
        return {}


def decode_small(pipe: Any, latents: torch.Tensor) -> Pixels:
    """Return an image of latents [1, C, H, W] with every few of their pixels."""
    config = pipe.vae.config
    stride = -(-max(latents.shape[-2:]) // LATENT_SIDE)
    with torch.no_grad():
        small = latents[:, :, ::stride, ::stride] / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
        image = pipe.vae.decode(small.to(next(pipe.vae.parameters()).dtype), return_dict=False)[0]
    return pixels_of(pipe.image_processor.postprocess(image, output_type="pil")[0])
