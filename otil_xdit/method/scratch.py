"""Reused buffers for intermediate results, so that nothing is allocated after the first step."""

from __future__ import annotations

import math

import torch

MOST_VIEWS = 1024
"""Views that are kept; a network requests a few hundred, and images of other sizes request others."""


class ScratchBuffers:
    """Buffers by name that all layers share; each grows to the largest size that was requested.

    A buffer is valid until the next layer call. Requesting the same name again invalidates the previous view.

    Args:
        device: of the buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, torch.Tensor] = {}
        # By request: making three views in a row costs more than many a computation in them.
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each buffer."""
        return {name: buffer.nbytes for name, buffer in self._buffers.items()}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the buffer `name` as a contiguous tensor of that shape and dtype; its contents are undefined."""
        found = self._views.get((name, shape, dtype))
        if found is None:
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            found = self._views[name, shape, dtype] = self._view(name, shape, dtype)
        return found

    def _view(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < size:
            buffer = self._buffers[name] = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._views = {key: view for key, view in self._views.items() if key[0] != name}
        return buffer[:size].view(dtype).view(shape)
