"""Which VAEs the ranks can share the rows of, and by what."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from otil_xdit.networks.vae.coder import PatchedCoder
from otil_xdit.networks.vae.video import VIDEO_VAES, PatchedVideoCoder

_OF_IMAGES = (
    "Encoder Decoder DownEncoderBlock2D UpDecoderBlock2D UNetMidBlock2D ResnetBlock2D Downsample2D Upsample2D "
    "Attention GroupNorm Conv2d Linear SiLU Dropout ModuleList Identity"
)
_OF_VIDEOS = "AvgDown3D DupUp3D Conv2d SiLU Dropout ModuleList Sequential Identity ZeroPad2d"
_NAMED_AFTER_THE_VAE = (
    "Encoder3d Decoder3d MidBlock ResidualBlock ResidualDownBlock ResidualUpBlock UpBlock Resample AttentionBlock "
    "CausalConv3d RMS_norm Upsample"
)
"""Modules that work on every row by itself, or on two rows that become one, or that have wrappers."""


_REPEATS = (
    "its middle attends from every place of a frame to all of that frame and those before, and its convolutions repeat "
    "the rows at the border, neither of which is made for patches; --enable_tiling decodes it in tiles"
)
_WHOLE = {
    "AutoencoderKLHunyuanVideo": _REPEATS,
    "AutoencoderKLHunyuanVideo15": _REPEATS,
}
"""Why the ranks cannot share the rows of some VAEs, by class name."""


def is_of_video(vae: Any) -> bool:
    """Return whether a VAE's encoder and decoder are called with frames."""
    return type(vae).__name__ in VIDEO_VAES


def coder_class(vae: Any) -> type[PatchedCoder]:
    """Return what shares the rows of a VAE for which `why_whole` is None."""
    return PatchedVideoCoder if is_of_video(vae) else PatchedCoder


def why_whole(vae: Any) -> str | None:
    """Return why every rank is to compute a VAE by itself; None where the ranks can share it.

    Args:
        vae: a pipeline's, or None.
    """
    prefix = VIDEO_VAES.get(type(vae).__name__)
    if prefix is None and type(vae).__name__ in _WHOLE:
        return _WHOLE[type(vae).__name__]
    if prefix is None and type(vae).__name__ != "AutoencoderKL":
        return f"it is no AutoencoderKL, {' or '.join(VIDEO_VAES)}"
    if getattr(vae, "use_tiling", False):
        return "it works in tiles"
    ends, known = ("Encoder", "Decoder"), frozenset(_OF_IMAGES.split())
    if prefix is not None:
        ends = (f"{prefix}Encoder3d", f"{prefix}Decoder3d")
        known = frozenset((*_OF_VIDEOS.split(), *(f"{prefix}{name}" for name in _NAMED_AFTER_THE_VAE.split())))
    for name, end in zip(("encoder", "decoder"), ends, strict=True):
        coder = getattr(vae, name)
        if type(coder).__name__ != end:
            return f"its {name} is a {type(coder).__name__}"
        for path, module in coder.named_modules():
            reason = _why_unknown(module, known)
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
    if isinstance(module, Attention) and (module.spatial_norm is not None or module.is_cross_attention):
        return "attends to more than the map"
    return None
