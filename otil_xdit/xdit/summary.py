"""What was done to a pipeline, and what its last image cost: `report` and `summary`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from diffusers.models.attention_processor import Attention
from torch import nn

from otil_xdit.exchange.report import Report
from otil_xdit.networks.unet.layers import spatial_layers
from otil_xdit.networks.unet.model import is_unet
from otil_xdit.runtime.network_hooks import NETWORKS
from otil_xdit.runtime.session import PatchSession
from otil_xdit.xdit.plugin.sessions import session_of

_SHARED_VAE = ("distvae", "xfuser")
"""Packages whose layers a VAE has that several ranks share."""


def report(pipe: Any) -> Report | None:
    """Return what this rank sent and waited for in the last image.

    Args:
        pipe: what `parallelize` returned.

    Returns:
        The counters of the last generation; None for a pipeline that exchanges nothing, such as any on one rank.
    """
    session = session_of(pipe)
    return None if session is None else session.report()


def summary(pipe: Any) -> str:
    """Describe what `parallelize` did to a pipeline, in at most ten lines.

    Args:
        pipe: what `parallelize` returned.

    Returns:
        Strategy, degrees, the layers that exchange something by kind, this rank's buffers, and what every rank
        computes whole. On one rank it says that nothing is exchanged.
    """
    session = session_of(pipe)
    inner = vars(pipe).get("module", pipe)
    name = type(inner).__name__
    if session is None:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        where = "one rank" if ranks == 1 else "no patches and no CFG parallelism"
        return f"{where}: {name} runs whole, nothing is exchanged"
    facts = session._facts
    degrees = [facts[f"the {of}"] for of in ("number of patches", "Ulysses degree", "CFG degree")]
    lines = [
        f"pipeline: {name}",
        f"strategy: {facts['the strategy']}",
        "ranks of an image: {} patches x {} Ulysses x {} CFG".format(*degrees),
        *(f"{part}: {_layers(network)}" for part, network in _networks(inner)),
        f"buffers: {_buffers(session)}",
        f"whole on every rank: {', '.join(_whole(inner)) or 'nothing'}",
    ]
    return "\n".join(lines)


def _networks(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    for name in NETWORKS:
        if isinstance(network := getattr(pipe, name, None), nn.Module):
            yield name, network


def _layers(network: nn.Module) -> str:
    """Count the layers that need something of the other ranks, by kind."""
    if not is_unet(network):
        attentions = sum(hasattr(module, "processor") for module in network.modules())
        return f"{attentions} attention layers (keys and values)"
    kinds = Counter(_kind(layer) for layer in spatial_layers(network).values())
    return ", ".join(f"{kinds[kind]} {kind}" for kind in sorted(filter(None, kinds)))


def _kind(layer: nn.Module) -> str | None:
    """Name a U-Net's layer and what it exchanges; None for attention to the text, which needs nothing."""
    if isinstance(layer, nn.Conv2d):
        return "convolutions (halo rows)"
    if isinstance(layer, nn.GroupNorm):
        return "group norms (moments)"
    return (
        "self-attentions (keys and values)" if isinstance(layer, Attention) and not layer.is_cross_attention else None
    )


def _buffers(session: PatchSession) -> str:
    made = session.report()
    if not made.steps:
        return "none yet, the first image makes them"
    return f"{made.buffer_bytes / 1e6:.1f} MB on this rank after an image of {made.steps} steps"


def _whole(pipe: Any) -> list[str]:
    """Name the networks of a pipeline that no rank has a part of."""
    networks = {id(network) for _, network in _networks(pipe)}
    others = getattr(pipe, "components", {}).items()
    return [
        name for name, part in others if isinstance(part, nn.Module) and id(part) not in networks and not _shared(part)
    ]


def _shared(part: nn.Module) -> bool:
    return any(type(module).__module__.partition(".")[0] in _SHARED_VAE for module in part.modules())
