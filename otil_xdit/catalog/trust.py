"""What of a model's files may run on this machine: nothing but weights without code, unless the user says otherwise.

A pickle runs what its author likes when it is loaded (torch keeps it from most of that since version 2.6). A
folder in diffusers format may name classes in Python files of its own, and some of xDiT's models do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from otil_xdit.errors import FlagError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
"""Weights in a format that can carry code, or that no reader here is known to be safe with."""

LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
"""Whose classes a pipeline's parts may be; the last one is diffusers' folder of the safety checker."""

WITH_REMOTE_CODE = ("lingbot_video", "ideogram4")
"""Modules of xfuser 0.7.0's runner models that load code from the model's repository."""


def add_trust_args(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow_pickle``; xDiT's own parser has ``--trust-remote-code``."""
    parser.add_argument_group("Trust options").add_argument(
        "--allow_pickle",
        action="store_true",
        help="U-Nets: load weights that are not safetensors, too. Such files can run code.",
    )


def check_trust(model: str, runner: type, values: Mapping[str, Any]) -> None:
    """Refuse a model of the command line that would run code which nobody has allowed.

    Args:
        model: name or folder.
        runner: its class in xfuser's registry.
        values: flags by name: ``allow_pickle``, ``trust_remote_code``.

    Raises:
        FlagError: naming the file, and the flag that allows it.
    """
    code = bool(values.get("trust_remote_code"))
    if runner.__module__.rpartition(".")[2] in WITH_REMOTE_CODE and not code:
        raise FlagError(f"--model {model}: xDiT runs code from its repository; give --trust-remote-code to allow that")
    if Path(model).is_dir():
        check_folder(model, bool(values.get("allow_pickle")), code)


def check_folder(folder: str, allow_pickle: bool = False, trust_remote_code: bool = False) -> None:
    """Refuse a folder in diffusers format that would run code; only its json files are read.

    Raises:
        FlagError: naming the file, and the flag that allows it.
    """
    if not allow_pickle:
        for path in _pickles(Path(folder)):
            raise FlagError(
                f"--model {folder}: {path} is a pickle, which can run code, and there are no safetensors beside it; "
                "save the pipeline again with safetensors, or give --allow_pickle if you trust it"
            )
    if not trust_remote_code:
        for what in _code(Path(folder)):
            raise FlagError(
                f"--model {folder}: {what} names code that is not of diffusers or transformers; "
                "give --trust-remote-code if you have read it"
            )


def check_lora(file: str) -> None:
    """Refuse a file of LoRA weights that can run code.

    Raises:
        FlagError: naming it.
    """
    if Path(file).suffix != ".safetensors":
        raise FlagError(f"{file} is not a safetensors file; others can run code: save it again as safetensors")


def _parts(folder: Path) -> dict[str, Any]:
    """The entries of ``model_index.json`` that are folders and classes; none where it cannot be read."""
    index = _json(folder / "model_index.json")
    return {name: kind for name, kind in index.items() if isinstance(kind, list) and not name.startswith("_")}


def _pickles(folder: Path) -> Iterator[Path]:
    """Pickles in the place of safetensors."""
    for part in sorted(_parts(folder)):
        files = sorted((folder / part).glob("*"))
        if not any(file.suffix == ".safetensors" for file in files):
            yield from (file.relative_to(folder) for file in files if file.suffix in PICKLES)


def _code(folder: Path) -> Iterator[str]:
    """What in a folder's json files names code of its own."""
    index = _json(folder / "model_index.json")
    if not isinstance(index.get("_class_name", ""), str) or "custom_pipeline" in index:
        yield "model_index.json's pipeline"
    for part, kind in sorted(_parts(folder).items()):
        library = kind[0] if kind else None
        if library is not None and library not in LIBRARIES:
            yield f"model_index.json's {part} ({library})"
        if isinstance(library, str) and (folder / part / f"{library}.py").exists():
            # diffusers looks for such a file before it looks for the library of that name.
            yield f"{part}/{library}.py"
        for file in sorted((folder / part).glob("*.json")):
            if "auto_map" in _json(file):
                yield f"{file.relative_to(folder)}'s auto_map"


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
