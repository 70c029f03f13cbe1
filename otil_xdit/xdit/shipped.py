"""Where the models lie that ship with this package."""

from __future__ import annotations

from importlib.resources import files


def model_folder(name: str) -> str:
    """The folder of a shipped model, in diffusers format."""
    return str(files("otil_xdit") / "models" / name)
