"""LPIPS, FID and CLIP score need weights of other networks: offered where those are on the disk, never fetched.

Images: a list of float32 [3, H, W] in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import torch

CLIP_MODEL = "openai/clip-vit-base-patch16"

Images = Sequence[torch.Tensor]


@dataclass(frozen=True)
class WeightedMetric:
    """A metric of torchmetrics that looks at images through a network.

    Attributes:
        name: as the table has it.
        package: what must be installed besides torchmetrics.
        files: names that the weights' file may have.
        where: the folder that is looked in, which is where the package itself looks before it fetches anything.
        measure: the figure, from the images, those of one process, the prompts, and the weights' file.
        least: the fewest images that it is given for.
    """

    name: str
    package: str
    files: tuple[str, ...]
    where: Callable[[], Path]
    measure: Callable[[Images, Images, Sequence[str], Path], float]
    least: int = 1

    def absence(self, images: int) -> str | None:
        """Return why the metric cannot be had for so many images, or None where it can."""
        if images < self.least:
            return f"{self.name}: it needs {self.least} images, and there are {images}"
        if find_spec(self.package) is None:
            return f"{self.name}: the package {self.package} is not installed"
        if self.found() is None:
            return f"{self.name}: no {' or '.join(self.files)} in {self.where()}"
        return None

    def found(self) -> Path | None:
        """Return the weights' file, or None."""
        paths = (self.where() / file for file in self.files)
        return next((path for path in paths if path.is_file()), None)


def absences(images: int) -> list[str]:
    """Return one reason for each metric that cannot be had here."""
    return [reason for metric in WEIGHTED if (reason := metric.absence(images)) is not None]


def weighted_figures(made: Images, references: Images, prompts: Sequence[str]) -> dict[str, float]:
    """Return each metric that can be had, by name; arguments in the order of the calls."""
    return {
        metric.name: metric.measure(made, references, prompts, weights)
        for metric in WEIGHTED
        if metric.absence(len(made)) is None and (weights := metric.found()) is not None
    }


def _torch_hub() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _clip_snapshot() -> Path:
    """Return the snapshot of `CLIP_MODEL` in the hub's cache that the branch ``main`` was when it was fetched."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{CLIP_MODEL.replace('/', '--')}"
    main = folder / "refs" / "main"
    return folder / "snapshots" / (main.read_text().strip() if main.is_file() else "main")


def _lpips(made: Images, references: Images, prompts: Sequence[str], weights: Path) -> float:
    """Return the mean LPIPS (Zhang et al., CVPR 2018) over AlexNet to one process's images; 0 for the same."""
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    pair = torch.stack(list(made)), torch.stack(list(references))
    return learned_perceptual_image_patch_similarity(*pair, net_type="alex", normalize=True).item()


def _fid(made: Images, references: Images, prompts: Sequence[str], weights: Path) -> float:
    """Return the Frechet distance (Heusel et al., NeurIPS 2017) of the images to one process's; 0 for the same."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    distance = FrechetInceptionDistance(normalize=True, feature_extractor_weights_path=str(weights))
    for images, real in ((references, True), (made, False)):
        for image in images:
            distance.update(image[None], real=real)
    return float(distance.compute().item())


def _clip_score(made: Images, references: Images, prompts: Sequence[str], weights: Path) -> float:
    """Return the mean CLIP score (Hessel et al., EMNLP 2021), 0 to 100, of the images with their prompts.

    torchmetrics 1.9 has it too, but not for transformers 5.
    """
    from transformers import CLIPModel, CLIPProcessor

    # A folder instead of a name: transformers then reads what is there, and fetches nothing.
    model, processor = (kind.from_pretrained(weights.parent) for kind in (CLIPModel, CLIPProcessor))
    images = [(image.clamp(0, 1) * 255).round().to(torch.uint8) for image in made]
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        with torch.inference_mode():
            seen = model(**processor(text=[prompt], images=[image], return_tensors="pt", truncation=True))
        scores.append(torch.cosine_similarity(seen.image_embeds, seen.text_embeds).item())
    return fmean(max(100 * score, 0.0) for score in scores)


LPIPS = WeightedMetric("LPIPS", "torchvision", ("alexnet-owt-7be5be79.pth",), _torch_hub, _lpips)
FID = WeightedMetric(
    "FID",
    "torch_fidelity",
    ("weights-inception-2015-12-05-6726825d.pth",),
    _torch_hub,
    _fid,
    least=64,  # it compares covariances, which a handful of images does not have
)
CLIP = WeightedMetric(
    "CLIP score", "transformers", ("model.safetensors", "pytorch_model.bin"), _clip_snapshot, _clip_score
)

WEIGHTED = (LPIPS, FID, CLIP)
