"""What a transformer's call says of its tokens, by its architecture (`otil_xdit.catalog.architectures`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from otil_xdit.catalog.architectures import UNKNOWN, UNTESTED, Architecture
from otil_xdit.catalog.models import architectures
from otil_xdit.method.grid import TokenLayout

_LIST_STEP = 32
"""Z-Image's captions and images are filled up with learned tokens to multiples of this."""


def architecture_of(network: nn.Module) -> Architecture:
    """The facts for a diffusers network, or for xDiT's wrapper of one."""
    kind = getattr(network, "module_type", type(network))
    known = architectures()
    return next((known[base.__name__] for base in kind.__mro__ if base.__name__ in known), UNKNOWN)


def is_untested(network: nn.Module) -> bool:
    """Return whether nobody has compared a network of this class on patches with one process."""
    return architecture_of(network) is UNKNOWN


def check_architecture(name: str, network: nn.Module, allow_untested: bool = False) -> None:
    """Check that patches do not make a network compute something else.

    Args:
        name: the pipeline's attribute that holds it.
        network: a diffusers model or xDiT's wrapper of one.
        allow_untested: take a class on that nobody has compared.

    Raises:
        ValueError: naming the network's class and the reason.
    """
    reason = architecture_of(network).refused
    if is_untested(network) and not allow_untested:
        reason = UNTESTED
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
    _check_masks(facts, network, kwargs)
    images = kwargs.get("x", latent)
    if isinstance(images, list):
        _check_lists(images, kwargs.get("cap_feats", args[2] if len(args) > 2 else ()), ranks)
    if not isinstance(latent, torch.Tensor):
        return None, TokenLayout(chunks=chunks)
    if not facts.rows or latent.ndim != 4:
        _check_even(facts, network, latent, kwargs.get("encoder_hidden_states"), ranks)
        return None, TokenLayout(chunks=chunks)
    pixels = network.config.patch_size
    rows, cols = latent.shape[2] // pixels, latent.shape[3] // pixels
    return latent, TokenLayout(rows, cols, pixels, facts.text, chunks)


def _check_masks(facts: Architecture, network: Any, kwargs: dict[str, Any]) -> None:
    """Check that xDiT reads the masks of the text as far as they are given."""
    if facts.masks == "any":
        return
    for name, mask in kwargs.items():
        if "mask" not in name or not isinstance(mask, torch.Tensor):
            continue
        expected = torch.ones_like(mask) if facts.masks == "none" else mask[:1].expand_as(mask)
        if not torch.equal(mask.bool(), expected.bool()):
            raise ValueError(
                f"{name} marks padding in a batch of prompts of different lengths, which xDiT would attend to; give "
                "one prompt at a time"
            )


def _check_lists(images: list[torch.Tensor], captions: Sequence[torch.Tensor], ranks: int) -> None:
    """Check Z-Image's lists of latents and captions, which diffusers fills up to multiples of 32 tokens."""
    texts = {-(-len(caption) // _LIST_STEP) * _LIST_STEP for caption in captions}
    tokens = {-(-image[0].numel() // 4 // _LIST_STEP) * _LIST_STEP for image in images}
    if len(texts) > 1 or len(tokens) > 1:
        raise ValueError(
            f"prompts of {' and '.join(map(str, sorted(texts)))} tokens in one batch would be filled up to the same "
            "length, and xDiT would attend to the padding; give a prompt and a negative prompt of like length"
        )
    uneven = [count for count in (*texts, *tokens) if count % ranks]
    if uneven:
        raise ValueError(
            f"{uneven[0]} tokens cannot be shared evenly by {ranks} ranks, and xDiT would go wrong; give a number of "
            "ranks that divides 32"
        )


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
