"""Payloads that have arrived and that the copies follow when they are read anyway, where kernels do it.

Each rank's copies of a layer are read once a step: this rank's own when its layer is called, for what it is called with
to be compared with them; those of others when attention reads them. Where they follow what came in that same pass, they
are read and written once.

Shapes: N patches, B batch, S tokens of one patch, C features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from otil_xdit.exchange.kv_copies import KVCopies
from otil_xdit.exchange.kv_kernels import PayloadKernels, ReadPayloads
from otil_xdit.exchange.kv_transform import KVTransform


@dataclass(frozen=True)
class _Arrived:
    """A layer's payloads, what reads them, the layers that came in one message, and whose copies have not followed.

    These are "all", "own", or "others".
    """

    read: ReadPayloads
    kernels: PayloadKernels
    run: slice
    whose: str = "all"


class ArrivedPayloads:
    """The payloads of a group's layers that not all copies have followed.

    Args:
        transform: of the layers.
        copies: of all ranks' values.
    """

    def __init__(self, transform: KVTransform, copies: KVCopies) -> None:
        self._transform, self._copies = transform, copies
        self._by_layer: dict[int, _Arrived] = {}

    def clear(self) -> None:
        """Forget them."""
        self._by_layer.clear()

    def take(self, run: slice, received: torch.Tensor, kernels: PayloadKernels) -> None:
        """Take everybody's payloads of a run of layers, uint8 [N, l, size]; copies follow by the other methods."""
        self.settle(run)
        read = kernels.read(self._copies.predictor, run, received)
        for layer in range(run.start, run.stop):
            self._by_layer[layer] = _Arrived(read.of_layer(layer - run.start), kernels, run)

    def follow_own(self, layer: int) -> dict[str, Any]:
        """Return what `KVTransform.take_own` needs to have this rank's copies of a layer follow, which it must do.

        They are empty where these have followed.
        """
        arrived = self._by_layer.get(layer)
        if arrived is None or arrived.whose == "others":
            return {}
        self._leave(layer, "others")
        return arrived.kernels.following(self._copies.predictor, arrived.read, self._transform.rank)

    def write(self, layer: int, out: torch.Tensor) -> None:
        """Have the other ranks' copies of a layer follow, and do what `KVCopies.write` does."""
        self._follow_others(layer, self._transform.writing(layer, out))

    def write_predicted(self, layer: int, out: torch.Tensor, extrapolating: dict[str, Any]) -> bool:
        """Have the other ranks' copies of a layer follow, and do what `KVResiduals.write_predicted` does.

        Returns:
            Whether anything of that layer had arrived; otherwise nothing is done.
        """
        if layer not in self._by_layer or self._by_layer[layer].whose == "own":
            return False
        self._follow_others(layer, {**self._transform.writing(layer, out), **extrapolating})
        return True

    def settle(self, run: slice | None = None) -> None:
        """Have all copies follow, of all layers or of those that lie where a message of `run` goes.

        These are more than the run where one of its layers came together with others.
        """
        for layer, arrived in list(self._by_layer.items()):
            if run is None or (arrived.run.start < run.stop and run.start < arrived.run.stop):
                del self._by_layer[layer]
                self._advance(layer, arrived, arrived.whose)

    def _follow_others(self, layer: int, writing: dict[str, Any]) -> None:
        arrived = self._by_layer[layer]
        self._leave(layer, "own")
        self._advance(layer, arrived, "others", writing)

    def _leave(self, layer: int, whose: str) -> None:
        """Take note that all copies of a layer but those have followed, or all if they had before."""
        arrived = self._by_layer.pop(layer)
        if arrived.whose == "all":
            self._by_layer[layer] = replace(arrived, whose=whose)

    def _advance(self, layer: int, arrived: _Arrived, whose: str, writing: dict[str, Any] | None = None) -> None:
        run, rank = slice(layer, layer + 1), self._transform.rank
        arrived.kernels.advance(self._copies.predictor, run, arrived.read, whose, rank, writing)
