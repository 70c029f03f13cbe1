"""The folder of images that are made already: a file for each, named by a digest of everything that determines it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import otil_xdit
from otil_xdit.runtime.versions import package_versions
from otil_xdit.tools.common.worker import Answer
from otil_xdit.tools.eval.matrix import Call, Case, Matrix

CALLERS = ("catalog/folders.py", "tools/eval/tasks.py")
"""The code that calls a pipeline, also that of one process."""

CHANGERS = ("tools/eval/equivalents.py",)
"""The code that changes a network for ``--variant``."""

REPORTERS = ("tools",)
"""Folders whose other code draws no image: a change of it makes nothing again."""


@dataclass(frozen=True)
class DrawnImage:
    """One image as it was made.

    Attributes:
        image: float32 [3, H, W] in 0..1; of a clip [F, 3, H, W].
        report: `otil_xdit.exchange.report.Report` of the rank that has the image, as a dict; None for one process.
        seconds: that the call of the pipeline took.
    """

    image: torch.Tensor
    report: dict[str, Any] | None
    seconds: float

    @classmethod
    def from_answer(cls, answer: Answer) -> DrawnImage:
        """Return the image that a rank has sent."""
        return cls(torch.from_numpy(answer["image"]), answer["report"], answer["seconds"])


class ImageCache:
    """Images by what determines them: weights, code, versions, device, settings, prompt, seed.

    Args:
        folder: made where it is missing.
        matrix: what all images have in common.
    """

    def __init__(self, folder: Path, matrix: Matrix) -> None:
        self.folder, self._matrix = folder, matrix
        folder.mkdir(parents=True, exist_ok=True)

    def key(self, case: Case, call: Call) -> str:
        """Return the name of an image's file, without its ending."""
        facts: dict[str, Any] = {
            "weights": fingerprint(case.model.folder),
            "lora": None if self._matrix.lora is None else fingerprint(self._matrix.lora),
            "versions": package_versions("torch", "diffusers", "transformers"),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "callers": code_fingerprint(CALLERS),
            "sampler": str(case.sampler),
            "guidance": self._matrix.guidance,
            "size": self._matrix.size,
            "dtype": str(self._matrix.dtype),
            "prompt": call.prompt,
            "seed": call.seed,
        }
        if case.model.frames:
            facts["frames"] = self._matrix.frames
        if case.variant is not None:
            settings = {name: value for name, value in case.variant.settings.items() if name != "timeout"}
            facts |= {"preset": case.variant.preset, "settings": settings, "ranks": case.ranks}
            facts |= {"cfg_parallel": case.cfg_parallel}
            facts |= {**package_versions("xfuser"), "code": code_fingerprint()}
        if case.equivalent is not None:
            facts |= {"equivalent": case.equivalent.text, "changes": code_fingerprint(CHANGERS)}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def path(self, case: Case, call: Call) -> Path:
        """Return an image's file, whether it is there or not."""
        return self.folder / f"{self.key(case, call)}.pt"

    def missing(self, case: Case) -> list[Call]:
        """Return the images of a case that are still to be made."""
        return [call for call in self._matrix.calls if not self.path(case, call).is_file()]

    def forget(self, case: Case) -> None:
        """Make a case's images missing again."""
        for call in self._matrix.calls:
            self.path(case, call).unlink(missing_ok=True)

    def save(self, case: Case, call: Call, drawn: DrawnImage) -> None:
        """Write an image's file; it appears complete or not at all."""
        path = self.path(case, call)
        unfinished = path.with_suffix(".part")
        torch.save({"image": drawn.image, "report": drawn.report, "seconds": drawn.seconds}, unfinished)
        os.replace(unfinished, path)

    def load(self, case: Case) -> list[DrawnImage]:
        """Return a case's images, in the order of the calls; all must have been made."""
        return [load_image(self.path(case, call)) for call in self._matrix.calls]


def load_image(path: Path) -> DrawnImage:
    """Return the image of a file of the cache."""
    return DrawnImage(**torch.load(path, weights_only=True))


@cache
def fingerprint(path: str) -> str:
    """Return a digest of the names, sizes and times of change of a folder's files, or of one file's."""
    root = Path(path)
    files = [root] if root.is_file() else sorted(found for found in root.rglob("*") if found.is_file())
    seen = [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


@cache
def code_fingerprint(names: tuple[str, ...] = ()) -> str:
    """Return a digest of files of this package by name; of all its code but that of `REPORTERS` where none is named."""
    root = Path(otil_xdit.__file__).parent
    found = sorted(str(file.relative_to(root)) for file in root.rglob("*.py"))
    digest = hashlib.sha256()
    for name in names or [name for name in found if Path(name).parts[0] not in REPORTERS]:
        digest.update(name.encode() + b"\0" + (root / name).read_bytes())
    return digest.hexdigest()
