"""Models that the tools load: bundled ones and folders in diffusers format; loading, and where an image is cut."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from otil_xdit.catalog.bundled import BUNDLED, BUNDLED_VIDEOS, absent_parts, model_folder
from otil_xdit.catalog.geometry import check_geometry
from otil_xdit.catalog.schedulers import make_scheduler
from otil_xdit.catalog.trust import check_folder, check_lora
from otil_xdit.catalog.unets import TEXT_TO_IMAGE, read_folder
from otil_xdit.method.grid import LevelGrid, split_rows

MODELS_HELP = f"{', '.join(BUNDLED)}, or folders in diffusers format (default tiny-sd)"
"""Of ``--models`` in the tools that run them."""

MODELS_AND_VIDEOS_HELP = f"{', '.join((*BUNDLED, *BUNDLED_VIDEOS))}, or folders in diffusers format (default tiny-sd)"
"""The same in a tool that takes models that draw clips."""

DIT_PIPELINES = ("StableDiffusion3Pipeline",)
"""DiTs whose rows of tokens are cut evenly, at a size that the caller chooses."""

VIDEO_PIPELINES = ("WanPipeline",)
"""DiTs that draw clips; their tokens, all frames' one after the other, are cut wherever the ranks' shares end."""

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
        frames: frames of a clip for every latent one after the first; 0 for images.
    """

    name: str
    folder: str
    is_unet: bool
    vae: int
    levels: int = 0
    patch: int = 1
    frames: int = 0

    @property
    def label(self) -> str:
        """The name without the folders above it."""
        return Path(self.name).name

    def check_size(self, size: int, ranks: int, block: int | None) -> None:
        """Refuse a square image of `size` pixels that `ranks` ranks cannot share, or too large a sub-block.

        Raises:
            ValueError: naming the flag and what would be accepted.
        """
        step = self.vae * self.patch * (1 if self.frames else ranks)
        if not self.is_unet and (size < step or size % step):
            raise ValueError(
                f"--size {size} cannot be cut into {ranks} patches with {self.name}; give a multiple of {step}"
            )
        if self.frames:
            return
        try:
            check_geometry({"model": self.name, "height": size, "width": size}, ranks, 1, block)
        except ValueError as error:
            message = str(error).replace("--height", "--size").replace("--otil_block_size", "block")
            raise ValueError(f"{self.name}: {message}") from error

    def borders(self, size: int, ranks: int) -> tuple[int, ...]:
        """The first image row of every patch but the first one's, for an image of `size` x `size` pixels.

        There is none in a clip: patches are runs of tokens, and where they end lies in the middle of a row.
        """
        if self.frames:
            return ()
        if self.is_unet:
            latent = size // self.vae
            rows, pixels = LevelGrid.build(latent, latent, self.levels, ranks).rows[0], self.vae
        else:
            pixels = self.vae * self.patch
            rows = split_rows(size // pixels, ranks)
        return tuple(pixels * row for row in accumulate(rows[:-1]))


def find_model(name: str, videos: bool = False) -> Model:
    """A shipped model by its name, or a folder in diffusers format.

    Args:
        name: of a model, or a folder.
        videos: take models that draw clips, too.

    Raises:
        ValueError: naming what is accepted.
    """
    known = (*BUNDLED, *BUNDLED_VIDEOS) if videos else BUNDLED
    folder = Path(model_folder(name) if name in known else name)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"--models {name}: no such model; choose from {', '.join(known)}, or give a folder in diffusers format"
        )
    pipeline = json.loads((folder / "model_index.json").read_text()).get("_class_name")
    if pipeline in TEXT_TO_IMAGE:
        record = read_folder(str(folder))
        return Model(name, str(folder), True, record.vae, levels=record.levels)
    dits = (*DIT_PIPELINES, *VIDEO_PIPELINES) if videos else DIT_PIPELINES
    if pipeline not in dits:
        raise ValueError(f"--models {name} is a {pipeline}; give a folder of {', '.join((*TEXT_TO_IMAGE, *dits))}")
    vae = json.loads((folder / "vae" / "config.json").read_text())
    transformer = json.loads((folder / "transformer" / "config.json").read_text())
    if pipeline in VIDEO_PIPELINES:
        patch, (space, time) = transformer["patch_size"], _wan_factors(vae)
        return Model(name, str(folder), False, space, patch=int(patch[-1]), frames=time)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return Model(name, str(folder), False, factor, patch=int(transformer["patch_size"]))


def _wan_factors(vae: dict[str, Any]) -> tuple[int, int]:
    """Return pixels of a latent pixel, per side, and frames of a latent frame, of Wan's autoencoder.

    Folders of Wan 2.1 do not name them; they are diffusers' defaults.
    """
    return int(vae.get("scale_factor_spatial", 8)), int(vae.get("scale_factor_temporal", 4))


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
        folder, **dtype_argument(dtype), use_safetensors=True, **absent_parts(folder)
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


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the argument of diffusers' `from_pretrained` that sets the weights' dtype.

    Version 0.40 renamed it and warns of the old name; older ones ignore the new one.
    """
    return {"dtype" if Version(version("diffusers")).release >= (0, 40) else "torch_dtype": dtype}


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
