"""Models that the tools load: bundled ones and folders in diffusers format; loading, and where an image is cut."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from otil_xdit.catalog.bundled import BUNDLED, absent_parts, model_folder
from otil_xdit.catalog.geometry import check_geometry
from otil_xdit.catalog.schedulers import make_scheduler
from otil_xdit.catalog.trust import check_folder, check_lora
from otil_xdit.catalog.unets import TEXT_TO_IMAGE, read_folder
from otil_xdit.method.grid import LevelGrid, split_rows

MODELS_HELP = f"{', '.join(BUNDLED)}, or folders in diffusers format (default tiny-sd)"
"""Of ``--models`` in the tools that run them."""

DIT_PIPELINES = ("StableDiffusion3Pipeline",)
"""DiTs whose rows of tokens are cut evenly, at a size that the caller chooses."""

OWN = "own"
"""The sampler that a model comes with; DiTs have no other here."""


@dataclass(frozen=True)
class Model:
    """What is known of a model before its weights load.

    Attributes:
        name: as the user gave it.
        folder: in diffusers format.
        is_unet: a U-Net, otherwise a DiT.
        vae: image pixels of a latent pixel, per side.
        levels: resolutions of a U-Net; 0 for a DiT.
        patch: latent pixels of a DiT's token, per side; 1 for a U-Net.
    """

    name: str
    folder: str
    is_unet: bool
    vae: int
    levels: int = 0
    patch: int = 1

    @property
    def label(self) -> str:
        """The name without the folders above it."""
        return Path(self.name).name

    def check_size(self, size: int, ranks: int, block: int | None) -> None:
        """Refuse a square image of `size` pixels that `ranks` ranks cannot share, or too large a sub-block.

        Raises:
            ValueError: naming the flag and what would be accepted.
        """
        step = self.vae * self.patch * ranks
        if not self.is_unet and (size < step or size % step):
            raise ValueError(
                f"--size {size} cannot be cut into {ranks} patches with {self.name}; give a multiple of {step}"
            )
        try:
            check_geometry({"model": self.name, "height": size, "width": size}, ranks, 1, block)
        except ValueError as error:
            message = str(error).replace("--height", "--size").replace("--otil_block_size", "block")
            raise ValueError(f"{self.name}: {message}") from error

    def borders(self, size: int, ranks: int) -> tuple[int, ...]:
        """The first image row of every patch but the first one's, for an image of `size` x `size` pixels."""
        if self.is_unet:
            latent = size // self.vae
            rows, pixels = LevelGrid.build(latent, latent, self.levels, ranks).rows[0], self.vae
        else:
            pixels = self.vae * self.patch
            rows = split_rows(size // pixels, ranks)
        return tuple(pixels * row for row in accumulate(rows[:-1]))


def find_model(name: str) -> Model:
    """A shipped model by its name, or a folder in diffusers format.

    Raises:
        ValueError: naming what is accepted.
    """
    folder = Path(model_folder(name) if name in BUNDLED else name)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"--models {name}: no such model; choose from {', '.join(BUNDLED)}, or give a folder in diffusers format"
        )
    pipeline = json.loads((folder / "model_index.json").read_text()).get("_class_name")
    if pipeline in TEXT_TO_IMAGE:
        record = read_folder(str(folder))
        return Model(name, str(folder), True, record.vae, levels=record.levels)
    if pipeline not in DIT_PIPELINES:
        known = ", ".join((*TEXT_TO_IMAGE, *DIT_PIPELINES))
        raise ValueError(f"--models {name} is a {pipeline}; eval compares folders of {known}")
    vae = json.loads((folder / "vae" / "config.json").read_text())
    transformer = json.loads((folder / "transformer" / "config.json").read_text())
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return Model(name, str(folder), False, factor, patch=int(transformer["patch_size"]))


def load_pipe(folder: str, sampler: str, lora: str | None, dtype: torch.dtype = torch.float32) -> Any:
    """The diffusers pipeline of a folder, on this process's device, without a progress bar.

    Args:
        folder: in diffusers format.
        sampler: `OWN`, or a name in `otil_xdit.catalog.schedulers.SCHEDULERS`.
        lora: a file of LoRA weights, or None.
        dtype: of all weights.
    """
    diffusers = importlib.import_module("diffusers")
    check_folder(folder)
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, **absent_parts(folder)
    )
    if sampler != OWN:
        pipe.scheduler = make_scheduler(sampler, pipe.scheduler)
    if lora is not None:
        check_lora(lora)
        pipe.load_lora_weights(str(Path(lora).parent), weight_name=Path(lora).name)
        if getattr(pipe, "unet", None) is None:
            # xDiT's wrappers of transformers take plain linear layers only. Fused for one process too: the same sums.
            pipe.fuse_lora()
            pipe.unload_lora_weights()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device())


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
