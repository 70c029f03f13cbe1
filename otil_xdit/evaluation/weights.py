"""LPIPS, FID and CLIP score need weights of other networks: offered where those are on the disk, never fetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

FID_PICTURES = 64
"""The fewest pictures that a FID is given for; its covariance is meaningless for a handful."""

CLIP_MODEL = "openai/clip-vit-base-patch16"


@dataclass(frozen=True)
class WeightedMetric:
    """A metric of torchmetrics that looks at pictures through a network.

    Attributes:
        name: as the table has it.
        package: what must be installed besides torchmetrics.
        files: names of the weights' file, any one of them will do.
        where: the folder that is looked in, which is where the package itself would look.
    """

    name: str
    package: str
    files: tuple[str, ...]
    where: Callable[[], Path]

    def found(self) -> Path | None:
        """The weights' file, or None."""
        return next((path for file in self.files for path in sorted(self.where().glob(file))), None)

    def absence(self) -> str | None:
        """Why the metric cannot be had, or None where it can."""
        if find_spec(self.package) is None:
            return f"{self.name}: the package {self.package} is not installed"
        if self.found() is None:
            return f"{self.name}: no {' or '.join(self.files)} in {self.where()}"
        return None


def _torch_hub() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _clip_cache() -> Path:
    """The folder of the hub's cache that has the snapshots of `CLIP_MODEL`."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{CLIP_MODEL.replace('/', '--')}" / "snapshots"


LPIPS = WeightedMetric("LPIPS", "torchvision", ("alexnet-owt-*.pth",), _torch_hub)
FID = WeightedMetric("FID", "torch_fidelity", ("weights-inception-2015-12-05-*.pth",), _torch_hub)
CLIP = WeightedMetric("CLIP score", "transformers", ("*/model.safetensors", "*/pytorch_model.bin"), _clip_cache)

WEIGHTED = (LPIPS, FID, CLIP)


def absences() -> list[str]:
    """One reason for each metric that cannot be had here."""
    return [reason for metric in WEIGHTED if (reason := metric.absence()) is not None]
