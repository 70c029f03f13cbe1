"""Room for what is needed for a moment only, so that nothing is allocated after the first step."""

from __future__ import annotations

import math

import torch

MOST_VIEWS = 1024
"""Views that are kept; a network asks for a few hundred, and pictures of other sizes for others."""


class ScratchBuffers:
    """Rooms by name that all layers use in turn; each grows to the largest that was asked of it.

    Whoever asks for a name again is done with what it held: a room is the caller's until the next call of any layer.

    Args:
        device: where the rooms are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._scratch_buffers: dict[str, torch.Tensor] = {}
        # As they were asked for: three views in a row cost more than many a computation in them.
        self._seen: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all rooms."""
        return sum(scratch.nbytes for scratch in self._scratch_buffers.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each room."""
        return {name: scratch.nbytes for name, scratch in self._scratch_buffers.items()}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The room `name` as a contiguous tensor of that shape and dtype, with whatever it holds."""
        found = self._seen.get((name, shape, dtype))
        if found is None:
            if len(self._seen) >= MOST_VIEWS:
                self._seen.clear()
            found = self._seen[name, shape, dtype] = self._view(name, shape, dtype)
        return found

    def _view(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        scratch = self._scratch_buffers.get(name)
        if scratch is None or scratch.nbytes < size:
            scratch = self._scratch_buffers[name] = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._seen = {key: view for key, view in self._seen.items() if key[0] != name}
        return scratch[:size].view(dtype).view(shape)
