"""`LoraListing`: the LoRAs that requests may name: those that the server's folder has now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from otil_xdit.serve.problems import Problem
from otil_xdit.serve.requests import LoraChoice

ENDING = ".safetensors"
"""The only kind of file that is read: pickles run code."""

MOST_LORAS = 8
"""Of one image."""


class LoraListing:
    """A folder's LoRAs. A name of a request is looked for in the listing, and never made a path.

    Args:
        folder: None where none may be named.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._paths())

    def choose(self, wanted: Sequence[tuple[str, float]], field: str) -> tuple[LoraChoice, ...]:
        """Return the LoRAs of these names and weights.

        Args:
            field: of the request, for messages.

        Raises:
            Problem: 400 for a name that is not in the listing, and for one that comes twice.
        """
        if not wanted:
            return ()
        if len(wanted) > MOST_LORAS or len({name for name, _ in wanted}) < len(wanted):
            raise Problem(400, f"{field} names one twice, or more than {MOST_LORAS}", field, "invalid_lora")
        paths = self._paths()
        for name, weight in wanted:
            if name not in paths:
                known = f"choose from {', '.join(sorted(paths)[:20])}" if paths else "this server has none"
                raise Problem(
                    400, f"{field} {name[:100]!r} is not a LoRA of this server; {known}", field, "unknown_lora"
                )
            if not -10 <= weight <= 10:
                raise Problem(400, f"{field} {name!r} has weight {weight:g}; give -10 to 10", field, "invalid_lora")
        return tuple(LoraChoice(name, paths[name], weight) for name, weight in wanted)

    def _paths(self) -> dict[str, str]:
        if self._folder is None:
            return {}
        try:
            files = [path for path in Path(self._folder).iterdir() if path.name.endswith(ENDING) and path.is_file()]
        except OSError:
            return {}
        return {path.name.removesuffix(ENDING): str(path) for path in files}
