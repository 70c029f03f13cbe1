"""The denoising networks of a pipeline."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")

NETWORKS = ("transformer", "transformer_2", "unet")
"""Attributes of a pipeline that may hold a denoising network."""


def _networks_of(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's denoising networks by attribute."""
    networks = {name: net for name in NETWORKS if isinstance(net := getattr(pipe, name, None), nn.Module)}
    # torch.compile(network) is a module round the network, whose layers are the ones that count.
    return {name: getattr(net, "_orig_mod", net) for name, net in networks.items()}


def _taken_out(found: dict[int, T], kept: set[int]) -> list[T]:
    """Take all entries but those of `kept` out of `found`."""
    return [found.pop(key) for key in [*found] if key not in kept]
