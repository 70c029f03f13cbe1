"""A group's keys and values as its layers have them, and as they are compared and coded: in coordinates.

Shapes: L layers, l of them in a run; N patches, B batch, S tokens of one patch, C features (H heads x D).
"""

from __future__ import annotations

from typing import Any

import torch

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.method.coordinates import Coordinates
from otil_xdit.method.kernels import is_fused
from otil_xdit.method.kernels.tiles import Tiles
from otil_xdit.method.predictor import other_ranks
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
        self._coded_dtype = dtype
        self._heads: dict[int, int] = {}
        self._numbers: torch.Tensor | None = None
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
        if is_fused(key):
            self._take(layer, (key, value), None, None, fresh)
            return fresh
        self._numbers = None
        for own, given in zip(fresh, (key, value), strict=True):
            own.unflatten(2, (key.shape[1], -1)).copy_(given.transpose(1, 2))
        return fresh

    def take_own(
        self,
        layer: int,
        called_with: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor | None,
        differs: bool,
        **compared: Any,
    ) -> None:
        """Do in one launch what `set_own` and `code_own` do, and more that follows from keys and values.

        Args:
            layer: its place.
            called_with: this rank's keys and values, each [B, H, S, D].
            out: becomes the keys and values, [2, B, S, C]; None to leave it.
            differs: whether `coded_own` is what a prediction of them lacks, instead.
            compared: of `otil_xdit.method.kernels.own.launch_take_own`: what they are compared with, what becomes of
                the comparison, and how the copies follow a payload first, see `PayloadKernels.following`.
        """
        self._coded_dtype = self.dtype  # kernels compute in float32, and write what copies are kept in
        coded = self.coded_own(slice(layer, layer + 1))[0]
        self._take(layer, called_with, self.into(layer), out, coded, differs, **compared)

    def _take(
        self,
        layer: int,
        called_with: tuple[torch.Tensor, torch.Tensor],
        matrices: torch.Tensor | None,
        out: torch.Tensor | None,
        taken: torch.Tensor,
        differs: bool = False,
        **compared: Any,
    ) -> None:
        from otil_xdit.method.kernels.own import take_own

        batch, self._heads[layer], tokens, _ = called_with[0].shape
        self._numbers = taken.new_empty(Tiles.of(batch, tokens).programs, dtype=torch.float32)
        take_own(*called_with, matrices, out, taken, self._numbers, differs, **compared)

    def numbers(self, layer: int) -> torch.Tensor:
        """Return numbers of which one is NaN or Inf if one is that this rank's layer was called with last."""
        return self.own_values(layer) if self._numbers is None else self._numbers

    def own_values(self, layer: int) -> torch.Tensor:
        """Return what `set_own` was given last for a layer, [2, B, S, C], until the next call of another group."""
        return self._scratch("fresh", (self._layers, *self.shape), self.dtype)[layer]

    def code_own(self, layer: int) -> torch.Tensor:
        """Take `own_values` into the layer's coordinates, and return them, [2, B, S, C], as `coded_own` does."""
        if self.is_identity:
            return self.own_values(layer)
        self._coded_dtype = torch.float32
        out = self.coded_own(slice(layer, layer + 1))
        self._coordinates[layer][0].into(self.own_values(layer)[None], out, self._scratch)
        return out[0]

    def coded_own(self, run: slice) -> torch.Tensor:
        """Return what `code_own` or `take_own` has made of a run of layers, [l, 2, B, S, C], in scratch."""
        name = "fresh" if self.is_identity else "fresh.coordinates"
        return self._scratch(name, (self._layers, *self.shape), self._coded_dtype)[run]

    def into(self, layer: int) -> torch.Tensor | None:
        """Return the matrices that make coordinates of a layer's features, as of `Coordinates`; None where none do."""
        return None if self.is_identity else self._coordinates[layer][0].matrices[0]

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

    def is_measured(self, layer: int) -> bool:
        """Tell whether a layer's coordinates follow from its first values, as nothing else says them."""
        return not self.is_identity and self._coordinates[layer][1]

    def measure(self, layer: int, values: torch.Tensor) -> bool:
        """Have a layer's coordinates follow from everybody's first values, [N, 2, B, S, C], if nothing else says them.

        Returns:
            Whether they have: until then they were the values themselves.
        """
        if not self.is_measured(layer):
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
            for others in other_ranks(self.rank, self.ranks):
                self._coordinates[layer][0].write_back(coded[others], out[others], self._scratch)
        out[self.rank] = self.own_values(layer)

    def write_others(
        self,
        layer: int,
        copies: torch.Tensor,
        velocities: torch.Tensor | None,
        totals: torch.Tensor | None,
        gains: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """Do in one launch what `write` does with extrapolated copies, but for this rank's, which `take_own` wrote.

        Args:
            layer: its place.
            copies, velocities: in its coordinates, [N, 2, B, S, C]; no velocities to take the copies as they are.
            totals: of `ChangeSums`, which the gain is fitted by, beginning with `gains`; None to take these.
            gains: float32 [2]; None without velocities.
            out: [N, 2, B, S, C], a view of a contiguous [2, B, N, S, C].
        """
        from otil_xdit.method.kernels.others import write_others

        write_others(copies, velocities, totals=totals, gains=gains, **self.writing(layer, out))

    def writing(self, layer: int, out: torch.Tensor) -> dict[str, Any]:
        """Return what kernels need that write a layer's keys and values to `out`, as of `write_others`."""
        matrices = None if self.is_identity else self._coordinates[layer][0].matrices[1]
        whole = out.permute(1, 2, 0, 3, 4)
        return {"matrices": matrices, "out": whole, "heads": self._heads[layer], "own": self.rank}
