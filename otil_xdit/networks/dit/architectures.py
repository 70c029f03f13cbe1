"""What a transformer's call says of its tokens, by its architecture (`otil_xdit.catalog.architectures`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from otil_xdit.catalog.architectures import ARCHITECTURES, UNKNOWN, Architecture
from otil_xdit.method.grid import TokenLayout


def architecture_of(network: nn.Module) -> Architecture:
    """The facts for a diffusers network, or for xDiT's wrapper of one."""
    kind = getattr(network, "module_type", type(network))
    names = (base.__name__ for base in kind.__mro__)
    return next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), UNKNOWN)


def check_architecture(name: str, network: nn.Module) -> None:
    """Raises `ValueError` for a network that patches would make compute something else."""
    reason = architecture_of(network).refused
    if reason:
        kind = getattr(network, "module_type", type(network)).__name__
        raise ValueError(f"--parallel does not support {kind} (the pipeline's {name}): {reason}")


def token_layout(network: Any) -> TokenLayout:
    """What is known of the attention sequences of a network before it is called: how large a token is."""
    facts = architecture_of(network)
    return TokenLayout(pixels=network.config.patch_size, text=facts.text) if facts.rows else TokenLayout()


def read_call(
    network: Any, args: tuple[Any, ...], kwargs: dict[str, Any], chunks: int, ranks: int
) -> tuple[torch.Tensor | None, TokenLayout]:
    """This rank's latent and the layout of its attention sequences, from a network call's arguments.

    Args:
        network: a diffusers model or xDiT's wrapper of one.
        args, kwargs: what it is called with.
        chunks: the Ulysses degree.
        ranks: patches times Ulysses degree: how many ranks share the tokens.

    Returns:
        The latent, [B, C, rows, cols], and the layout; None and a layout of unknown order for
        architectures that are not called with rows.

    Raises:
        ValueError: where the tokens cannot be shared out and the result would be wrong.
    """
    facts = architecture_of(network)
    latent = kwargs.get("hidden_states", args[0] if args else None)
    if not isinstance(latent, torch.Tensor):
        return None, TokenLayout(chunks=chunks)
    if not facts.rows or latent.ndim != 4:
        _check_even(facts, network, latent, kwargs.get("encoder_hidden_states"), ranks)
        return None, TokenLayout(chunks=chunks)
    pixels = network.config.patch_size
    rows, cols = latent.shape[2] // pixels, latent.shape[3] // pixels
    return latent, TokenLayout(rows, cols, pixels, facts.text, chunks)


def _check_even(facts: Architecture, network: Any, latent: torch.Tensor, text: Any, ranks: int) -> None:
    for kind in facts.even:
        count = _image_tokens(network, latent) if kind == "image" else getattr(text, "shape", [0, 0])[1]
        if count % ranks:
            remedy = {
                "image": "change --height or --width",
                "text": "change --max_sequence_length, or the prompt where the model does not pad it,",
            }[kind]
            raise ValueError(
                f"{count} {kind} tokens cannot be shared evenly by {ranks} ranks, and xDiT would go wrong; "
                f"{remedy} so that their number is a multiple of {ranks}"
            )


def _image_tokens(network: Any, latent: torch.Tensor) -> int:
    """Tokens of packed latents, [B, S, C], or of a video, [B, C, frames, rows, cols]."""
    if latent.ndim == 3:
        return latent.shape[1]
    return math.prod(size // side for size, side in zip(latent.shape[2:], network.config.patch_size, strict=True))
