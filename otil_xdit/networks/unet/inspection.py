"""What of a U-Net is wrapped: for tests and for those who add layers."""

from __future__ import annotations

from torch import nn

from otil_xdit.networks.unet.layers import is_spatial, is_wrapped


def spatial_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Every layer that looks beyond a patch, by its name in the network."""
    return {path: module for path, module in network.named_modules() if is_spatial(module)}


def unwrapped(network: nn.Module) -> list[str]:
    """Names of the layers that look beyond a patch and are not wrapped."""
    return [path for path, module in spatial_layers(network).items() if not is_wrapped(module)]
