"""The transformers that xDiT runs: one record a model. Those that have none here are untested.

Over 300 lines: it is one list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from otil_xdit.catalog.architectures import ARCHITECTURES, UNKNOWN, UNTESTED, Architecture
from otil_xdit.catalog.record import ModelRecord, NetworkConfig

Cut = Literal["rows", "padded"]
"""What the ranks share: rows of tokens, or tokens, which are filled up until the ranks divide them."""

ULYSSES_ONLY = "xDiT cuts it by Ulysses only; use --ulysses_degree"
ONE_DEVICE = "xDiT makes an image on one device with it"

_T5_TOKENS = 256
"""Of SD3: `max_sequence_length` of diffusers' pipeline unless the user says otherwise."""


def why_refused(record: ModelRecord | None, capabilities: Any, allow_untested: bool = False) -> str | None:
    """Return why a model of xDiT's registry does not run under ``--parallel``; None where it does.

    Args:
        record: of the model; None where nothing is known of it.
        capabilities: what xDiT says of it.
        allow_untested: take a model on that nobody has compared with one process.
    """
    if not capabilities.ring_degree and not (isinstance(record, DitRecord) and record.needs_no_ring):
        return ULYSSES_ONLY if capabilities.ulysses_degree else ONE_DEVICE
    if record is None or (isinstance(record, DitRecord) and record.state == "untested"):
        return None if allow_untested else UNTESTED
    return record.refusal()


@dataclass(frozen=True, kw_only=True)
class DitRecord(ModelRecord):
    """What is known of one transformer.

    Attributes:
        kind: its network's class in diffusers.
        frames: default number of a video's frames; 0 for images.
        architecture: how xDiT cuts that class; None for what `otil_xdit.catalog.architectures` says of it.
        needs_no_ring: xDiT refuses a ring for it, because a ring would need other masks than gathered keys do.
    """

    kind: str = ""
    frames: int = 0
    architecture: Architecture | None = None
    needs_no_ring: bool = False

    @property
    def facts(self) -> Architecture:
        """How xDiT cuts it."""
        return self.architecture or ARCHITECTURES.get(self.kind, UNKNOWN)

    @property
    def cut(self) -> Cut:
        return "rows" if self.facts.rows else "padded"

    def latent_frames(self, frames: int) -> int:
        """Return the frames of the latent: one for the first of a video, and one for every four after it."""
        return 1 + frames // 4 if self.frames else 1


DITS = (
    DitRecord(
        names=("tiny-dit",),
        state="exact",
        note="SD3's architecture; ships with this package",
        kind="SD3Transformer2DModel",
        vae=4,
        patch=2,
        height=128,
        width=128,
    ),
    DitRecord(
        names=("SD3.5", "stabilityai/stable-diffusion-3.5-large"),
        state="exact",
        kind="SD3Transformer2DModel",
        vae=8,
        patch=2,
        height=1024,
        width=1024,
        network=NetworkConfig(
            kind="SD3Transformer2DModel",
            label="SD3.5",
            settings={
                "num_layers": 38,
                "num_attention_heads": 38,
                "attention_head_dim": 64,
                "joint_attention_dim": 4096,
                "caption_projection_dim": 2432,
                "out_channels": 16,
                "pos_embed_max_size": 192,
                "qk_norm": "rms_norm",
            },
            text_tokens=77 + _T5_TOKENS,
        ),
    ),
    DitRecord(
        names=("stabilityai/stable-diffusion-3.5-medium",),
        state="exact",
        has_runner=False,
        kind="SD3Transformer2DModel",
        vae=8,
        patch=2,
        height=1024,
        width=1024,
    ),
    DitRecord(
        names=("stabilityai/stable-diffusion-3-medium-diffusers",),
        state="exact",
        has_runner=False,
        kind="SD3Transformer2DModel",
        vae=8,
        patch=2,
        height=1024,
        width=1024,
        network=NetworkConfig(
            kind="SD3Transformer2DModel",
            label="SD3",
            settings={
                "num_layers": 24,
                "num_attention_heads": 24,
                "attention_head_dim": 64,
                "joint_attention_dim": 4096,
                "caption_projection_dim": 1536,
                "out_channels": 16,
                "pos_embed_max_size": 192,
            },
            text_tokens=77 + _T5_TOKENS,
        ),
    ),
    DitRecord(
        names=("PixArt-alpha/PixArt-XL-2-1024-MS",),
        state="exact",
        has_runner=False,
        kind="PixArtTransformer2DModel",
        vae=8,
        patch=2,
        height=1024,
        width=1024,
        network=NetworkConfig(
            kind="PixArtTransformer2DModel",
            label="PixArt",
            settings={"caption_channels": 4096, "cross_attention_dim": 1152},
            text_tokens=300,
        ),
    ),
    DitRecord(
        names=("black-forest-labs/FLUX.1-dev",),
        state="exact",
        kind="FluxTransformer2DModel",
        vae=8,
        patch=2,  # the pipeline packs 2 x 2 latent pixels into a token
        height=1024,
        width=1024,
        # Its guidance is distilled.
        network=NetworkConfig(kind="FluxTransformer2DModel", label="FLUX", passes=1, text_tokens=512),
    ),
    DitRecord(
        names=("FLUX.1-Kontext-dev", "black-forest-labs/FLUX.1-Kontext-dev"),
        state="exact",
        kind="FluxTransformer2DModel",
    ),
    DitRecord(
        names=("black-forest-labs/FLUX.2-dev",),
        state="exact",
        kind="Flux2Transformer2DModel",
        vae=8,
        patch=2,
        height=1024,
        width=1024,
    ),
    DitRecord(
        names=("black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-9B"),
        state="exact",
        kind="Flux2Transformer2DModel",
        vae=8,
        patch=2,
        height=2048,
        width=2048,
    ),
    DitRecord(
        names=("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"),
        state="exact",
        kind="QwenImageTransformer2DModel",
        vae=8,
        patch=2,
        height=928,
        width=1664,
    ),
    DitRecord(
        names=("Qwen-Image-Edit", "Qwen/Qwen-Image-Edit", "Qwen-Image-Edit-2509", "Qwen-Image-Edit-2511"),
        state="exact",
        kind="QwenImageTransformer2DModel",
    ),
    DitRecord(
        names=("Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo"),
        state="exact",
        kind="ZImageTransformer2DModel",
        vae=8,
        patch=2,
        height=1024,
        width=1024,
    ),
    DitRecord(
        names=("Wan2.1-T2V", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        state="exact",
        kind="WanTransformer3DModel",
        vae=8,
        patch=2,
        height=720,
        width=1280,
        frames=81,
    ),
    DitRecord(
        names=("Wan2.2-T2V", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
        state="exact",
        kind="WanTransformer3DModel",
        vae=8,
        patch=2,
        height=720,
        width=1280,
        frames=81,
    ),
    DitRecord(
        names=(
            "Wan2.1-I2V",
            "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
            "Wan2.2-I2V",
            "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
            "Wan2.2-Distilled-I2V",
            "Wan2.2-TI2V",
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        ),
        state="exact",
        kind="WanTransformer3DModel",
    ),
    DitRecord(
        names=(
            "Wan2.1-VACE-14B",
            "Wan-AI/Wan2.1-VACE-14B-diffusers",
            "Wan2.1-VACE-1.3B",
            "Wan-AI/Wan2.1-VACE-1.3B-diffusers",
        ),
        state="exact",
        kind="WanVACETransformer3DModel",
    ),
    DitRecord(
        names=(
            "LTX-2",
            "Lightricks/LTX-2",
            "LTX-2.3",
            "dg845/LTX-2.3-Diffusers",
            "LTX-2.5",
            "LTX-2.5-distilled",
            "LTX-2.5-full",
            "Lightricks/LTX-2.5-Diffusers",
        ),
        state="exact",
        kind="LTX2VideoTransformer3DModel",
    ),
    DitRecord(
        names=("Cosmos3-Super", "nvidia/Cosmos3-Super", "Cosmos3-Nano", "nvidia/Cosmos3-Nano"),
        state="exact",
        kind="Cosmos3OmniTransformer",
    ),
    DitRecord(
        names=("Ideogram-4", "ideogram-ai/ideogram-v4", "CalamitousFelicitousness/Ideogram-4-bf16-Diffusers"),
        state="exact",
        kind="Ideogram4Transformer2DModel",
    ),
    DitRecord(
        names=("Hunyuanvideo-1.5", "Hunyuanvideo-1.5-Distilled", "tencent/HunyuanVideo-1.5"),
        state="exact",
        kind="HunyuanVideo15Transformer3DModel",
    ),
    DitRecord(
        names=("Hunyuanvideo-1.5-Sparse",),
        state="refused",
        note="its sparse attention lays blocks over the whole video, and a rank has a part of it",
        kind="HunyuanVideo15Transformer3DModel",
    ),
    DitRecord(
        names=("HunyuanVideo", "tencent/HunyuanVideo"),
        state="exact",
        kind="HunyuanVideoTransformer3DModel",
        vae=8,
        patch=2,
        height=720,
        width=1280,
        frames=129,
    ),
    DitRecord(
        names=("Lumina2", "Alpha-VLLM/Lumina-Image-2.0", "Lumina-Image-2.0"),
        state="exact",
        kind="Lumina2Transformer2DModel",
        needs_no_ring=True,
    ),
    DitRecord(names=("Krea-2-Raw", "Krea-2-Turbo"), state="exact", kind="Krea2Transformer2DModel", needs_no_ring=True),
)
