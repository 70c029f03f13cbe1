"""Which weights lie in a folder in diffusers format, and whether they are whole: told before any process starts.

A safetensors file begins with the length of its header (8 bytes, little-endian) and the header, a json object that
says where each tensor ends; so a file that was cut off is known by its size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from otil_xdit.catalog.trust import PICKLES
from otil_xdit.errors import FlagError

_WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")


def check_weights(folder: str, allow_pickle: bool = False) -> None:
    """Refuse a folder in which weights are missing or cut off; of the weights only headers are read.

    Raises:
        FlagError: naming the file.
    """
    for part in _networks(Path(folder)):
        files = sorted(part.glob("*.safetensors"))
        if not files and not (allow_pickle and any(file.suffix in PICKLES for file in part.iterdir())):
            raise FlagError(f"--model {folder}: {part.name} has no weights (*.safetensors); copy the folder again")
        for file in (*files, *_shards(part)):
            reason = _why_broken(file)
            if reason is not None:
                raise FlagError(f"--model {folder}: {part.name}/{file.name} {reason}; copy or download it again")


def variant_of(folder: str) -> str | None:
    """Return the variant that must be named to load a folder's weights, "fp16" say; None where none needs to be."""
    for part in _networks(Path(folder)):
        found = {match[1] for file in part.glob("*.safetensors") if (match := _WEIGHTS.fullmatch(file.name))}
        if found and None not in found:
            return min(found)
    return None


def _networks(folder: Path) -> Iterator[Path]:
    """The folders of a pipeline's networks: parts with a ``config.json``, as schedulers and tokenizers have none."""
    index = _json(folder / "model_index.json")
    for name, kind in sorted(index.items()):
        if isinstance(kind, list) and kind != [None, None] and (folder / name / "config.json").is_file():
            yield folder / name


def _shards(part: Path) -> Iterator[Path]:
    """The files that an index of shards names."""
    for index in sorted(part.glob("*.safetensors.index*.json")):
        places = _json(index).get("weight_map")
        yield from (part / name for name in sorted(set(places.values() if isinstance(places, dict) else ())))


def _why_broken(file: Path) -> str | None:
    """Return what is wrong with a safetensors file; None where its size is what its header says."""
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(length)) if 8 + length <= size else None
        except ValueError:
            return "is no safetensors file"
    if not isinstance(header, dict):
        return f"is cut off after {size} bytes"
    ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
    whole = 8 + length + max(ends, default=0)
    return None if size >= whole else f"is cut off: {size} bytes of {whole}"


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
