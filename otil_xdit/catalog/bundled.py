"""Where the models lie that ship with this package, and what diffusers wants to be told about a folder."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

BUNDLED_UNETS = ("tiny-sd", "tiny-sdxl")

TINY_DIT = "tiny-dit"

BUNDLED = (*BUNDLED_UNETS, TINY_DIT)
"""Names of the models that ship with this package and draw images."""

BUNDLED_VIDEOS = ("tiny-video",)
"""Names of those that draw clips."""


def model_folder(name: str) -> str:
    """The folder of a shipped model, in diffusers format."""
    return str(files("otil_xdit") / "weights" / name)


def absent_parts(folder: str) -> dict[str, None]:
    """The parts that a folder in diffusers format says it has not, for `from_pretrained(folder, **parts)`.

    A pipeline class that declares them (SD3's third text encoder) loads without them only when it is told so again.
    """
    index = json.loads((Path(folder) / "model_index.json").read_text())
    return {name: None for name, kind in index.items() if kind == [None, None]}
