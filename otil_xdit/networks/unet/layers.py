"""Wrapping the layers of a U-Net that look beyond a patch: convolutions, group norms, attention.

Each is the layer itself with another `forward` (`otil_xdit.networks.class_swap`), so parameters, their names, hooks and
`isinstance` stay. Outside a patched pass they do what they always did.
"""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from torch import nn

from otil_xdit.networks.class_swap import is_swapped, restore_class, swap_class
from otil_xdit.networks.handles import Handle
from otil_xdit.networks.unet.attention import check_attention, patched_attention
from otil_xdit.networks.unet.context import CONTEXT, LayerContext
from otil_xdit.networks.unet.conv import check_conv, patched_conv
from otil_xdit.networks.unet.group_norm import check_group_norm, patched_group_norm

_CONDITION = "controlnet_cond_embedding."


def is_spatial(module: nn.Module) -> bool:
    """Tell whether a patch of the module's input is not enough for the same patch of its output."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size[0] > 1
    return isinstance(module, (nn.GroupNorm, Attention))


def is_wrapped(module: nn.Module) -> bool:
    """Tell whether `wrap_layer` was applied to a layer."""
    return CONTEXT in vars(module)


def spatial_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the spatial layers of a network by their names in it; a ControlNet's condition is whole on every rank."""
    found = ((path, module) for path, module in network.named_modules() if not path.startswith(_CONDITION))
    return {path: module for path, module in found if is_spatial(module)}


def unwrapped_layers(network: nn.Module) -> list[str]:
    """Return the names of the spatial layers of a network that are not wrapped."""
    return [path for path, module in spatial_layers(network).items() if not is_wrapped(module)]


def wrap_layer(module: nn.Module, context: LayerContext) -> None:
    """Let a spatial layer work on patches. Wrapping it again gives it another context.

    Raises:
        ValueError: naming the layer and what of it patches cannot serve.
    """
    if not is_swapped(module):
        if isinstance(module, nn.Conv2d):
            check_conv(module, context.name)
            swap_class(module, patched_conv)
        elif isinstance(module, nn.GroupNorm):
            check_group_norm(module, context.name)
            swap_class(module, patched_group_norm)
        else:
            swap_class(module, patched_attention)
    if isinstance(module, Attention):
        check_attention(module, context.name)
    before: LayerContext | None = vars(module).get(CONTEXT)
    if before is None or before.handle is None:
        context.handle = Handle.make(context, context.exchange.order)
    else:  # the same one, as a compiled graph knows it
        context.handle = before.handle
        context.handle.give_to(context)
    vars(module)[CONTEXT] = context


def unwrap_layer(module: nn.Module) -> None:
    """Undo `wrap_layer`; a layer that is not wrapped stays as it is."""
    vars(module).pop(CONTEXT, None)
    if is_swapped(module):
        restore_class(module)
