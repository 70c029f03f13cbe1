"""Which VAEs the ranks can share the rows of, and by what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from otil_xdit.networks.vae.coder import PatchedCoder
from otil_xdit.networks.vae.cogvideo import PatchedCogVideoCoder
from otil_xdit.networks.vae.hunyuan import PatchedHunyuanCoder
from otil_xdit.networks.vae.ltx import PatchedLtxCoder
from otil_xdit.networks.vae.video import PatchedVideoCoder


@dataclass(frozen=True)
class _Kind:
    """A class of VAEs whose rows ranks can share.

    Attributes:
        coder: what shares them.
        ends: names of the classes of its encoder and of its decoder.
        layers: names of the classes of their modules, which work on every row by itself, or on two rows that become
            one, or have wrappers.
    """

    coder: type[PatchedCoder]
    ends: tuple[str, str]
    layers: frozenset[str]


def _kind(coder: type[PatchedCoder], prefix: str, ends: str, own: str, others: str) -> _Kind:
    """Return a kind; `ends` and `own` are names of classes behind `prefix`, `others` whole names."""
    encoder, decoder = (f"{prefix}{name}" for name in ends.split())
    return _Kind(coder, (encoder, decoder), frozenset((encoder, decoder, *_named(prefix, own), *others.split())))


def _named(prefix: str, names: str) -> Iterable[str]:
    return (f"{prefix}{name}" for name in names.split())


_COMMON = "Conv2d Conv3d Linear SiLU Dropout ModuleList Sequential Identity "
_WAN = (
    "Encoder3d Decoder3d",
    "MidBlock ResidualBlock ResidualDownBlock ResidualUpBlock UpBlock Resample AttentionBlock CausalConv3d RMS_norm "
    "Upsample",
    _COMMON + "AvgDown3D DupUp3D ZeroPad2d",
)
_LTX = (
    "Encoder3d Decoder3d",
    "MidBlock3d ResnetBlock3d DownBlock3D 095DownBlock3D UpBlock3d Downsampler3d Upsampler3d CausalConv3d",
    _COMMON + "RMSNorm LayerNorm PerChannelRMSNorm "
    "PixArtAlphaCombinedTimestepSizeEmbeddings Timesteps TimestepEmbedding",
)
_OF_IMAGES = _kind(
    PatchedCoder,
    "",
    "Encoder Decoder",
    "DownEncoderBlock2D UpDecoderBlock2D UNetMidBlock2D ResnetBlock2D Downsample2D Upsample2D Attention GroupNorm",
    _COMMON,
)
_KINDS = {
    "AutoencoderKL": _OF_IMAGES,
    "AutoencoderKLFlux2": _OF_IMAGES,
    "AutoencoderKLWan": _kind(PatchedVideoCoder, "Wan", *_WAN),
    "AutoencoderKLQwenImage": _kind(PatchedVideoCoder, "QwenImage", *_WAN),
    "AutoencoderKLHunyuanVideo": _kind(
        PatchedHunyuanCoder,
        "HunyuanVideo",
        "Encoder3D Decoder3D",
        "MidBlock3D ResnetBlockCausal3D DownBlock3D UpBlock3D DownsampleCausal3D UpsampleCausal3D CausalConv3d",
        _COMMON + "Attention GroupNorm",
    ),
    "AutoencoderKLHunyuanVideo15": _kind(
        PatchedHunyuanCoder,
        "HunyuanVideo15",
        "Encoder3D Decoder3D",
        "MidBlock ResnetBlock DownBlock3D UpBlock3D Downsample Upsample AttnBlock CausalConv3d RMS_norm",
        _COMMON,
    ),
    "AutoencoderKLLTXVideo": _kind(PatchedLtxCoder, "LTXVideo", *_LTX),
    "AutoencoderKLLTX2Video": _kind(PatchedLtxCoder, "LTX2Video", *_LTX),
    "AutoencoderKLCogVideoX": _kind(
        PatchedCogVideoCoder,
        "CogVideoX",
        "Encoder3D Decoder3D",
        "MidBlock3D ResnetBlock3D DownBlock3D UpBlock3D Downsample3D Upsample3D CausalConv3d SafeConv3d SpatialNorm3D",
        _COMMON + "GroupNorm",
    ),
}
"""All kinds by the name of the VAE's class."""


def coder_class(vae: Any) -> type[PatchedCoder]:
    """Return what shares the rows of a VAE for which `why_whole` is None."""
    return _KINDS[type(vae).__name__].coder


def why_whole(vae: Any) -> str | None:
    """Return why every rank is to compute a VAE by itself; None where the ranks can share it.

    Args:
        vae: a pipeline's, or None.
    """
    kind = _KINDS.get(type(vae).__name__)
    if kind is None:
        return f"it is no {' or '.join(_KINDS)}"
    if getattr(vae, "use_tiling", False):
        return "it works in tiles"
    for name, end in zip(("encoder", "decoder"), kind.ends, strict=True):
        coder = getattr(vae, name)
        if type(coder).__name__ != end:
            return f"its {name} is a {type(coder).__name__}"
        for path, module in coder.named_modules():
            reason = _why_unknown(module, kind.layers)
            if reason is not None:
                return f"its layer {name}.{path} {reason}"
    return None


def _why_unknown(module: nn.Module, known: frozenset[str]) -> str | None:
    """Return why a module may not compute on a patch what it computes on the whole map; None where it does."""
    kind = type(module)
    if kind.__name__ not in known or not kind.__module__.startswith(("torch.nn.", "diffusers.models.")):
        return f"is a {kind.__module__}.{kind.__name__}"
    if "forward" in vars(module) or module._compiled_call_impl is not None:
        return "has a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has hooks"
    if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
        return "draws at random"
    if getattr(module, "per_channel_scale1", None) is not None:
        return "adds noise that it draws for the whole map"
    if getattr(module, "padding_mode", "") == "circular":
        return "joins the image's edges"
    if (side := getattr(module, "patch_size", 1)).bit_count() != 1:
        return f"takes {side} x {side} pixels as one"
    if isinstance(module, Attention) and (module.spatial_norm is not None or module.is_cross_attention):
        return "attends to more than the map"
    return None
