"""Payloads that have arrived and that the copies follow layer by layer, where kernels do it.

A step that waits for nothing corrects the copies by what came, and extrapolates them for attention: where both happen
in one pass over a layer's copies, these are read and written once. This rank's own follow at once, as what it is called
with is compared with them; those of others when their layer is called.

Shapes: l layers of a run; N patches, B batch, S tokens of one patch, C features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from otil_xdit.exchange.kv_copies import KVCopies
from otil_xdit.exchange.kv_kernels import PayloadKernels, ReadPayloads
from otil_xdit.exchange.kv_transform import KVTransform


@dataclass(frozen=True)
class _Arrived:
    """Where what is known of a layer's payloads stands: at `place` of what was read of a run of layers."""

    read: ReadPayloads
    place: int


class ArrivedPayloads:
    """The payloads of a group's layers that not all copies have followed.

    Args:
        transform: of the layers.
        copies: of all ranks' values.
        kernels: read payloads.
    """

    def __init__(self, transform: KVTransform, copies: KVCopies, kernels: PayloadKernels) -> None:
        self._transform, self._copies, self._kernels = transform, copies, kernels
        self._by_layer: dict[int, _Arrived] = {}

    def clear(self) -> None:
        """Forget them."""
        self._by_layer.clear()

    def take(self, run: slice, received: torch.Tensor) -> None:
        """Have this rank's own copies of a run of layers follow everybody's payloads, uint8 [N, l, size]."""
        read = self._kernels.read(self._copies.predictor, run, received)
        self._kernels.advance(self._copies.predictor, run, read, "own", self._transform.rank)
        self._by_layer.update({layer: _Arrived(read, layer - run.start) for layer in range(run.start, run.stop)})

    def write_predicted(self, layer: int, out: torch.Tensor) -> bool:
        """Have the other ranks' copies of a layer follow, and do what `KVCopies.write_predicted` does.

        Returns:
            Whether anything of that layer had arrived; otherwise nothing is done.
        """
        arrived = self._by_layer.pop(layer, None)
        if arrived is None:
            return False
        self._advance(layer, arrived, {**self._transform.writing(layer, out), **self._copies.extrapolating(layer)})
        return True

    def settle(self) -> None:
        """Have all copies follow."""
        for layer, arrived in self._by_layer.items():
            self._advance(layer, arrived, {})
        self._by_layer.clear()

    def _advance(self, layer: int, arrived: _Arrived, writing: dict[str, object]) -> None:
        read, run = arrived.read.of_layer(arrived.place), slice(layer, layer + 1)
        self._kernels.advance(self._copies.predictor, run, read, "others", self._transform.rank, writing)
