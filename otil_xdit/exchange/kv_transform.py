"""A group's keys and values as its layers have them, and as they are compared and coded: in coordinates.

Shapes: L layers, l of them in a run; N patches, B batch, S tokens of one patch, C features (H heads x D).
"""

from __future__ import annotations

import torch

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.method.coordinates import Coordinates
from otil_xdit.method.scratch import ScratchBuffers


class KVTransform:
    """This rank's keys and values of a group's layers, and the coordinates in which all that is sent is computed.

    Without coordinates everything is compared and coded as it is, and nothing is copied for it.

    Args:
        shape, dtype: of one rank's keys and values of one layer, [2, B, S, C].
        group: the ranks that hold the patches.
        scratch: for results.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, group: PatchGroup, scratch: ScratchBuffers) -> None:
        self.shape, self.dtype = shape, dtype
        self.rank, self.ranks = group.rank, group.world_size
        self._scratch = scratch
        self._layers = 0
        self._coordinates: list[tuple[Coordinates, bool]] = []

    def join(self, coordinates: tuple[Coordinates, bool] | None) -> None:
        """Add a layer; see `KVGroup.join`."""
        self._layers += 1
        if coordinates is not None:
            self._coordinates.append(coordinates)

    def begin(self) -> None:
        """Start a generation: forget what coordinates were measured from."""
        for coordinates, is_measured in self._coordinates:
            if is_measured:
                coordinates.scale(torch.ones(2, self.shape[-1], device=self._scratch.device))

    @property
    def is_identity(self) -> bool:
        """Tell whether values are compared and coded as they are."""
        return not self._coordinates

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device."""
        return sum(kept.nbytes for kept, _ in self._coordinates)

    def set_own(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Keep what this rank's layer is called with, each [B, H, S, D], and return it as `own_values` does."""
        fresh = self.own_values(layer)
        for own, given in zip(fresh, (key, value), strict=True):
            own.unflatten(2, (key.shape[1], -1)).copy_(given.transpose(1, 2))
        return fresh

    def own_values(self, layer: int) -> torch.Tensor:
        """Return what this rank's layer was called with last, [2, B, S, C], until the next call of another group."""
        return self._scratch("fresh", (self._layers, *self.shape), self.dtype)[layer]

    def code_own(self, layer: int) -> torch.Tensor:
        """Take `own_values` into the layer's coordinates, and return them, [2, B, S, C], as `coded_own` does."""
        if self.is_identity:
            return self.own_values(layer)
        out = self.coded_own(slice(layer, layer + 1))
        self._coordinates[layer][0].into(self.own_values(layer)[None], out, self._scratch)
        return out[0]

    def coded_own(self, run: slice) -> torch.Tensor:
        """Return what `code_own` has made of a run of layers, [l, 2, B, S, C], in scratch."""
        name, dtype = ("fresh", self.dtype) if self.is_identity else ("fresh.coordinates", torch.float32)
        return self._scratch(name, (self._layers, *self.shape), dtype)[run]

    def code(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        """Return everybody's keys and values of a layer, [N, 2, B, S, C], in its coordinates; in scratch."""
        if self.is_identity:
            return values
        out = self.coded_buffer()
        self._coordinates[layer][0].into(values, out, self._scratch)
        return out

    def coded_buffer(self) -> torch.Tensor:
        """Return scratch for everybody's keys and values of a layer in its coordinates, float32 [N, 2, B, S, C]."""
        return self._scratch("predicted", (self.ranks, *self.shape), torch.float32)

    def measure(self, layer: int, values: torch.Tensor) -> bool:
        """Have a layer's coordinates follow from everybody's first values, [N, 2, B, S, C], if nothing else says them.

        Returns:
            Whether they have: until then they were the values themselves.
        """
        if self.is_identity or not self._coordinates[layer][1]:
            return False
        self._coordinates[layer][0].measure(self.coded_buffer().copy_(values).square_())
        return True

    def write(self, layer: int, coded: torch.Tensor, out: torch.Tensor) -> None:
        """Write everybody's keys and values of a layer to `out`; this rank's are the fresh ones.

        Args:
            layer: its place.
            coded: in its coordinates, [N, 2, B, S, C].
            out: [N, 2, B, S, C].
        """
        if self.is_identity:
            out.copy_(coded)
        else:
            for others in (slice(0, self.rank), slice(self.rank + 1, self.ranks)):
                if len(coded[others]):
                    out[others] = self._coordinates[layer][0].back(coded[others], self._scratch)
        out[self.rank] = self.own_values(layer)
