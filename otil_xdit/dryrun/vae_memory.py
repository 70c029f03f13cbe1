"""Memory of a VAE on patches: the most bytes that one rank's tensors take at once, counted on "meta"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLLTX2Video
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from otil_xdit.dryrun.job import ParallelDegrees
from otil_xdit.dryrun.networks import META
from otil_xdit.dryrun.recorder import Log, RecordedCollectives
from otil_xdit.dryrun.stand_ins import patch_group
from otil_xdit.exchange.synchronous import SynchronousExchange
from otil_xdit.networks.vae.support import coder_class


@dataclass(frozen=True)
class PublishedVae:
    """A VAE whose memory can be counted.

    Attributes:
        kind: its class.
        settings: those that differ from the defaults of the class.
        channels: of a latent.
        scale: pixels a side of one of a latent.
        frames: of a clip's latent, that diffusers decodes at once; None for an image's.
        decodes: what it decodes at once, in words.
    """

    kind: Any
    settings: dict[str, Any]
    channels: int
    scale: int = 8
    frames: int | None = None
    decodes: str = "an image"


PUBLISHED_VAES = {
    "SDXL": PublishedVae(  # stabilityai/sdxl-vae, config.json
        AutoencoderKL,
        {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
        },
        channels=4,
    ),
    "HunyuanVideo": PublishedVae(AutoencoderKLHunyuanVideo, {}, channels=16, frames=5, decodes="17 frames"),
    "CogVideoX": PublishedVae(AutoencoderKLCogVideoX, {}, channels=16, frames=3, decodes="9 frames"),
    "LTX-2": PublishedVae(AutoencoderKLLTX2Video, {}, channels=128, scale=32, frames=16, decodes="121 frames"),
}
"""By the model that has it; SD1.5 and SD2 have SDXL's, too."""


def peak_of_decoding(vae: PublishedVae, size: int, ranks: int, dtype: torch.dtype) -> int:
    """Return the most bytes that a rank's activations take at once while a VAE decodes, weights left out.

    Attention counts as its inputs and its result, and a mask that it is given, as a kernel takes it that keeps no
    scores.

    Args:
        vae: one of `PUBLISHED_VAES`.
        size: height and width of the image, in pixels.
        ranks: that share its rows; the first one is counted, which has the most.
        dtype: of the activations.
    """
    with torch.device(META), torch.no_grad():
        whole = vae.kind(**vae.settings).eval()
        whole.decoder.to(dtype)
        frames = () if vae.frames is None else (vae.frames,)
        latent = torch.empty(1, vae.channels, *frames, size // vae.scale, size // vae.scale, dtype=dtype)
        if ranks > 1:
            collectives = RecordedCollectives(patch_group(ParallelDegrees(patches=ranks), 0), 1.0, log=Log())
            coder_class(whole)(whole.decoder, SynchronousExchange(collectives, "vae"), lambda: True).prepare()
        with _FusedAttention(), PeakBytes() as peak:
            whole.decoder(latent)
    return peak.most


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that were made within it and are still there.

    Attributes:
        most: at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        for tensor in tree_leaves(out):
            if _is_tensor(tensor) and tensor.untyped_storage()._cdata not in known:
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(nbytes for _, nbytes in self._made.values()))
        return out


class _FusedAttention(TorchFunctionMode):
    """Replaces attention by its result's shape: on "meta" torch would make the scores too."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
