"""Checks of a U-Net or a ControlNet and its calls: each refuses, by name, what patches would compute differently."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
MID_BLOCKS = ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "NoneType")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
"""Blocks of diffusers that are built of the layers which `otil_xdit.networks.unet.layers` wraps."""

_SETTINGS: dict[str, tuple[Any, ...]] = {
    "downsample_padding": (1,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "addition_embed_type": (None, "text", "text_time"),
    "encoder_hid_dim_type": (None, "text_proj", "ip_image_proj"),
    "dual_cross_attention": (False, None),
    "conv_in_kernel": (1, 3),
    "conv_out_kernel": (1, 3),
}
"""Settings of a `UNet2DConditionModel` and the values under which patches give what one device gives."""

_LOCAL = (
    *(nn.Module, nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict),
    *(nn.Conv2d, nn.GroupNorm, nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.RMSNorm),
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid),
    *(nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink),
    *(nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold),
)
"""Layers of torch that treat every pixel or token by itself, or that wrappers serve. All others look beyond a patch, or
might: pooling, other convolutions and norms, recurrence, torch's own attention, a softmax over an unknown dimension."""

_OF_WEIGHTS = "torch.nn.utils.parametrize"
"""Modules that compute weights, whose own parts never see a map."""

_OF_PROMPTS = "encoder_hid_proj"
"""The part of a U-Net that projects texts and images of prompts, which are whole on all ranks."""

_PASSED_KWARGS = ("scale",)
"""Entries of `cross_attention_kwargs` that mean the same on a patch: the weight of LoRA."""


def check_supported(network: Any) -> None:
    """Validate that patches can serve a U-Net.

    Raises:
        ValueError: naming the block, setting or layer that they cannot serve.
    """
    kinds = {
        "down block": (DOWN_BLOCKS, network.down_blocks),
        "mid block": (MID_BLOCKS, [network.mid_block]),
        "up block": (UP_BLOCKS, getattr(network, "up_blocks", ())),
    }
    kind = "U-Net" if hasattr(network, "up_blocks") else "ControlNet"
    for what, (known, blocks) in kinds.items():
        for block in blocks:
            if type(block).__name__ not in known:
                raise ValueError(
                    f"--parallel does not support a {kind} with the {what} {type(block).__name__}; it knows "
                    f"{', '.join(name for name in known if name != 'NoneType')}"
                )
    for setting, accepted in _SETTINGS.items():
        value = network.config.get(setting, accepted[0])
        if value not in accepted:
            raise ValueError(
                f"--parallel does not support a {kind} with {setting} = {value!r}; it knows "
                f"{', '.join(repr(choice) for choice in accepted)}"
            )


def check_layers(network: Any) -> None:
    """Validate that no layer of torch looks beyond a patch unless it is wrapped.

    Raises:
        ValueError: naming the layer.
    """
    weights: tuple[str, ...] = ()
    for path, module in network.named_modules():
        kind: Any = type(module)
        if kind.__module__ == _OF_WEIGHTS and not isinstance(module, (nn.Conv2d, nn.Linear)):
            weights = (*weights, path)
        elif not _is_local(kind) and not path.startswith((_OF_PROMPTS, *weights)):
            raise ValueError(
                f"--parallel does not support the layer {path} ({kind.__name__}) of a U-Net: it may look beyond a patch"
            )


@cache
def _is_local(kind: type) -> bool:
    """Tell whether a class is no layer of torch, or one of `_LOCAL`."""
    own = vars(kind).get("_otil_base", kind)
    return next(base for base in own.__mro__ if base.__module__.startswith("torch.nn.modules.")) in _LOCAL


def check_heads(name: str, layer: Any, ulysses_degree: int) -> None:
    """Validate that Ulysses can share out the heads of a self-attention layer; other layers have none to share.

    Raises:
        ValueError: naming the layer.
    """
    heads = getattr(layer, "heads", ulysses_degree)
    if heads % ulysses_degree and not layer.is_cross_attention:
        raise ValueError(
            f"--ulysses_degree {ulysses_degree} cannot share out the {heads} attention heads of the U-Net's layer "
            f"{name}; give a degree that divides them, or more patches instead"
        )


def check_arguments(kwargs: dict[str, Any]) -> None:
    """Validate that a U-Net's arguments mean the same on patches.

    Raises:
        ValueError: naming the argument.
    """
    if kwargs.get("attention_mask") is not None:
        raise ValueError("--parallel does not support attention_mask of a U-Net: it describes whole maps")
    unknown = set(kwargs.get("cross_attention_kwargs") or {}) - set(_PASSED_KWARGS)
    if unknown:
        raise ValueError(
            f"--parallel does not support {', '.join(sorted(unknown))} in cross_attention_kwargs; it knows "
            f"{', '.join(_PASSED_KWARGS)}"
        )


def check_freeu(network: Any) -> None:
    """Validate that FreeU is off.

    Raises:
        ValueError: where any block has its scales.
    """
    if any(getattr(block, name, None) is not None for block in network.up_blocks for name in ("s1", "s2", "b1", "b2")):
        raise ValueError("--parallel does not support FreeU, which filters whole maps; call disable_freeu()")
