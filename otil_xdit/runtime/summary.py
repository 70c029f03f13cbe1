"""`Summary`: what a session does to a pipeline, as facts; whoever prints them owns the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from otil_xdit.comm.groups import PatchGroup, UnetGroups
from otil_xdit.exchange.report import Report
from otil_xdit.networks.unet.layers import spatial_layers
from otil_xdit.runtime.network_hooks import NETWORKS, controlnets_of, is_patched, networks_of
from otil_xdit.runtime.vae_sharing import VaeSharing

LayerKind = Literal["attention", "self-attention", "convolution", "group norm"]
"""Layers that need something of other ranks: ``attention`` is a DiT's, the others are a U-Net's or a ControlNet's."""

_SHARED_PACKAGES = ("distvae", "xfuser")
"""Packages whose layers a VAE has that several ranks share."""


@dataclass(frozen=True)
class Summary:
    """What a session does to one pipeline.

    Attributes:
        pipeline: class name.
        strategy: name.
        patch_degree, ulysses_degree, cfg_degree: ranks per dimension.
        layers: number of layers that exchange something, by attribute of the network and by kind.
        steps: of the last generation; 0 before the first one, which makes the buffers.
        buffer_bytes: this rank's buffers.
        whole: attributes of the pipeline's other networks that every rank computes whole.
    """

    pipeline: str
    strategy: str
    patch_degree: int
    ulysses_degree: int
    cfg_degree: int
    layers: Mapping[str, Mapping[LayerKind, int]]
    steps: int
    buffer_bytes: int
    whole: tuple[str, ...]


def summarize(
    pipe: Any,
    strategy: str,
    group: PatchGroup,
    cfg_groups: UnetGroups | None,
    report: Report,
    vae: VaeSharing | None = None,
) -> Summary:
    """Return what a session does to a pipeline.

    Args:
        strategy: its name.
        group: the ranks that hold the patches.
        cfg_groups: the CFG groups; None for no CFG parallelism.
        report: of the session.
        vae: what shares a pipeline's VAE; None for nothing.
    """
    controls = controlnets_of(pipe)
    shared = {"controlnet"} if controls else set()
    if vae is not None and vae.shares(getattr(pipe, "vae", None)):
        shared.add("vae")
    return Summary(
        pipeline=type(pipe).__name__,
        strategy=strategy,
        patch_degree=group.world_size,
        ulysses_degree=group.ulysses_degree,
        cfg_degree=1 if cfg_groups is None else cfg_groups.cfg_degree,
        layers={name: count_layers(net) for name, net in {**networks_of(pipe), **controls}.items()},
        steps=report.steps,
        buffer_bytes=report.buffer_bytes,
        whole=tuple(name for name in whole_parts(pipe) if name not in shared),
    )


def count_layers(network: nn.Module) -> Counter[LayerKind]:
    """Return how many layers of a denoising network need something of other ranks, by kind."""
    if not is_patched(network):
        return Counter({"attention": sum(hasattr(module, "processor") for module in network.modules())})
    return Counter(kind for layer in spatial_layers(network).values() if (kind := _kind_of(layer)) is not None)


def whole_parts(pipe: Any) -> tuple[str, ...]:
    """Return the attributes of a pipeline's networks that no rank has a part of: text encoders, and often the VAE."""
    others = ((name, part) for name, part in getattr(pipe, "components", {}).items() if name not in NETWORKS)
    return tuple(name for name, part in others if isinstance(part, nn.Module) and not _is_shared(part))


def _kind_of(layer: nn.Module) -> LayerKind | None:
    """Return a U-Net layer's kind; None for attention to the text, which needs nothing."""
    if isinstance(layer, nn.Conv2d):
        return "convolution"
    if isinstance(layer, nn.GroupNorm):
        return "group norm"
    return None if getattr(layer, "is_cross_attention", True) else "self-attention"


def _is_shared(part: nn.Module) -> bool:
    return any(type(module).__module__.partition(".")[0] in _SHARED_PACKAGES for module in part.modules())
