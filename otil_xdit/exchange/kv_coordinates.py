"""The coordinates of attention layers, by the names under which layers are called."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.method.coordinates import AttentionWeights, Coordinates


class LayerCoordinates:
    """The coordinates of all layers of a pipeline.

    Args:
        group: the ranks that hold the patches; this rank has a share of the heads where some share a patch's.

    Attributes:
        digest: of all coordinates, equal for equal ones.
    """

    def __init__(self, group: PatchGroup) -> None:
        self._degree = group.ulysses_degree
        self._place = group.rows.rank % self._degree if group.rows is not None else 0
        self.digest = ""
        self._state: dict[str, tuple[object, ...]] = {}
        self._by_layer: dict[str, Coordinates | None] = {}

    def update(self, layers: Mapping[str, AttentionWeights]) -> str:
        """Compute the coordinates of layers that are new or whose weights have been written to, and forget the others.

        Args:
            layers: by ``network/module``.

        Returns:
            A digest of all coordinates.
        """
        computed: dict[int, Coordinates | None] = {}
        by_layer = {}
        for name, weights in layers.items():
            if self._state.get(name) == weights.state:
                by_layer[name] = self._by_layer[name]
                continue
            if id(weights) not in computed:
                computed[id(weights)] = Coordinates.of_weights(weights)
            by_layer[name] = computed[id(weights)]
        self._state = {name: weights.state for name, weights in layers.items()}
        self._by_layer = by_layer
        digests = sorted(f"{name} {found.digest:08x}" for name, found in by_layer.items() if found is not None)
        self.digest = f"{zlib.crc32(' '.join(digests).encode()):08x}"
        return self.digest

    def make(self, name: str, key: torch.Tensor) -> tuple[Coordinates, bool]:
        """Return the coordinates of a layer that is called for the first time.

        Args:
            name: ``network/.../module#n``.
            key: [B, H, S, d], of this rank's heads.

        Returns:
            Memory of the caller's own, and whether it is to be filled by `Coordinates.measure`: where the weights say
            nothing.
        """
        heads, size = key.shape[1], key.shape[3]
        network, _, rest = name.partition("/")
        module = rest.rpartition("#")[0].rpartition("/")[2]
        known = self._by_layer.get(f"{network}/{module}")
        if known is None or known.matrices[0].shape[1:3] != (heads * self._degree, size):
            # A dry run has no weights, and plans for layers that have.
            return Coordinates.unknown(heads, size, key.device), not key.is_meta
        return known.of_heads(self._place * heads, heads, key.device), False
