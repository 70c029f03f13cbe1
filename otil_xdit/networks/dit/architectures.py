"""What a transformer's call says of its tokens, by its architecture (`otil_xdit.catalog.architectures`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from otil_xdit.catalog.architectures import UNKNOWN, UNTESTED, Architecture
from otil_xdit.catalog.models import architectures
from otil_xdit.method.grid import TokenLayout


def architecture_of(network: nn.Module) -> Architecture:
    """Return the facts for a diffusers network, or for xDiT's wrapper of one."""
    known = architectures()
    return next((known[base.__name__] for base in _kind(network).__mro__ if base.__name__ in known), UNKNOWN)


def is_untested(network: nn.Module) -> bool:
    """Return whether nobody has compared a network of this class on patches with one process."""
    return architecture_of(network) is UNKNOWN


def is_cut_by_pipeline(network: nn.Module) -> bool:
    """Return whether this is xDiT's wrapper of a network, whose pipeline hands it a rank's tokens alone."""
    return hasattr(network, "module_type")


def cuts_tokens_itself(network: nn.Module) -> bool:
    """Return whether a network shares out the tokens that it is given, whatever their number."""
    facts = architecture_of(network)
    return facts.whole_masks or (bool(facts.sequences) and not is_cut_by_pipeline(network))


def check_architecture(name: str, network: nn.Module, allow_untested: bool = False) -> None:
    """Check that patches do not make a network compute something else.

    Args:
        name: the pipeline's attribute that holds it.
        network: a diffusers model or xDiT's wrapper of one.
        allow_untested: take a class on that nobody has compared.

    Raises:
        ValueError: naming the network's class and the reason.
    """
    facts = architecture_of(network)
    settings = [why for name, why in facts.refused_settings.items() if getattr(network.config, name, None)]
    reason = facts.refused or "; ".join(settings)
    if is_untested(network) and not allow_untested:
        reason = UNTESTED
    if reason:
        raise ValueError(f"--parallel does not support {_kind(network).__name__} (the pipeline's {name}): {reason}")


def token_layout(network: Any) -> TokenLayout:
    """Return what is known of the attention sequences of a network before it is called: how large a token is."""
    facts = architecture_of(network)
    return TokenLayout(pixels=network.config.patch_size, text=facts.text) if facts.rows else TokenLayout()


def read_call(
    network: Any, args: tuple[Any, ...], kwargs: dict[str, Any], chunks: int
) -> tuple[torch.Tensor | None, TokenLayout]:
    """Read this rank's latent and the layout of its attention sequences from a network call's arguments.

    Args:
        network: a diffusers model or xDiT's wrapper of one.
        args, kwargs: what it is called with.
        chunks: the Ulysses degree.

    Returns:
        The latent, [B, C, rows, cols], and the layout; None and a layout of unknown order for architectures that are
        not called with rows.
    """
    facts = architecture_of(network)
    latent = kwargs.get("hidden_states", args[0] if args else None)
    if not isinstance(latent, torch.Tensor) or not facts.rows or latent.ndim != 4:
        return None, TokenLayout(chunks=chunks)
    pixels = network.config.patch_size
    rows, cols = latent.shape[2] // pixels, latent.shape[3] // pixels
    return latent, TokenLayout(rows, cols, pixels, facts.text, chunks)


def _kind(network: nn.Module) -> type:
    kind: type = getattr(network, "module_type", type(network))
    return kind
