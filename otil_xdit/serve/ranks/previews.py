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
        size: height and width of the image in pixels, which a packed latent does not tell; None for not known.
        show: called with each.
    """

    def __init__(self, count: int, size: tuple[int | None, int | None], show: Callable[[Pixels], None]) -> None:
        self._count, self._size, self._show = count, size, show

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Be a ``callback_on_step_end`` that changes nothing."""
        latents, steps = tensors.get("latents"), int(pipe.num_timesteps)
        is_its_turn = (step + 1) * (self._count + 1) // steps > step * (self._count + 1) // steps
        if is_its_turn and step + 1 < steps and isinstance(latents, torch.Tensor):
            latents = unpacked(pipe, latents[:1], *self._size)
            if latents is not None:
                self._show(decode_small(pipe, latents))
        return {}


def unpacked(pipe: Any, latents: torch.Tensor, height: int | None, width: int | None) -> torch.Tensor | None:
    """Return latents [1, C, H, W], or [1, C, 1, H, W] of a VAE for videos; None where it is not known how.

    Args:
        latents: as a callback has them; Flux and Qwen-Image hold 2 x 2 pixels in a token, [1, tokens, 4 C].
        height, width: of the image in pixels.
    """
    if latents.dim() == 3 and hasattr(pipe, "_unpack_latents") and height is not None and width is not None:
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    return latents if latents.dim() == 4 or (latents.dim() == 5 and latents.shape[2] == 1) else None


def decode_small(pipe: Any, latents: torch.Tensor) -> Pixels:
    """Return an image of latents, as `unpacked` gives them, with every few of their pixels."""
    stride = -(-max(latents.shape[-2:]) // LATENT_SIDE)
    with torch.no_grad():
        small = _scaled_back(pipe.vae.config, latents[..., ::stride, ::stride])
        image = pipe.vae.decode(small.to(next(pipe.vae.parameters()).dtype), return_dict=False)[0]
    if image.dim() == 5:
        image = image[:, :, 0]
    return pixels_of(pipe.image_processor.postprocess(image, output_type="pil")[0])


def _scaled_back(config: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return latents in the scale of the VAE: by one factor and shift, or by mean and deviation of each channel."""
    if getattr(config, "latents_mean", None) is None:
        return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
    shape = (1, -1) + (1,) * (latents.dim() - 2)
    mean, deviation = (latents.new_tensor(one).view(shape) for one in (config.latents_mean, config.latents_std))
    return latents * deviation / getattr(config, "scaling_factor", 1.0) + mean
