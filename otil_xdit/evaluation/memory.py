"""`otil-xdit memory`: how many bytes a rank keeps for the exchange. Nothing is computed: all tensors are on "meta".

The figures are read from the layers that a run would make, which are made here and called twice: nothing is estimated.

Shapes: N ranks, B batch, S tokens of one rank, C features.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from otil_xdit.config import OtilConfig
from otil_xdit.exchange import PatchGroup
from otil_xdit.kv import KVLayer
from otil_xdit.picking import Picker
from otil_xdit.planner.networks import META, Layer
from otil_xdit.schedule import Clock


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank; `largest` is of one layer, all others are of all layers.

    `values`, `velocities` (with the ages of tokens) and `buffers` (payloads to send and received) make up `total`;
    `rooms` are what all layers use in turn, by name.
    """

    largest: int
    values: int
    velocities: int
    buffers: int
    rooms: dict[str, int]

    @property
    def total(self) -> int:
        return self.values + self.velocities + self.buffers


def memory_of(layers: Counter[Layer], ranks: int, batch: int, dtype: torch.dtype, config: OtilConfig) -> Memory:
    """What one rank keeps for these layers under `config`, after a synchronous step and another one."""
    largest, kept, rooms = 0, Counter[str](), Counter[str]()
    for layer, count in layers.items():
        made = _made(layer, ranks, batch, dtype, config, rooms)
        largest = max(largest, made.nbytes)
        values, *velocities = (tensor.nbytes for tensor in made.shared_state)
        kept["values"] += count * values
        kept["velocities"] += count * sum(velocities)
        kept["buffers"] += count * (made.nbytes - values - sum(velocities))
    return Memory(largest, kept["values"], kept["velocities"], kept["buffers"], dict(rooms))


def _made(layer: Layer, ranks: int, batch: int, dtype: torch.dtype, config: OtilConfig, rooms: Counter[str]) -> KVLayer:
    """The layer after two steps; `rooms` grow to the largest that it asked for."""

    def room(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype, device=META)
        rooms[name] = max(rooms[name], made.nbytes)
        return made

    nowhere = _Nowhere(ranks)
    picker = Picker(config, Clock(), nowhere.group)
    picker.observe(None, layer.layout)
    fresh = torch.empty(2, batch, layer.tokens, layer.width, dtype=dtype, device=META)
    table = picker.table(layer.tokens, META)
    made = KVLayer(nowhere, "meta", fresh, table, config)  # type: ignore[arg-type]  # what it asks of an exchange
    for mode in ("sync", config.freshness):
        made.gather(fresh, mode, lambda now, old: picker.pick("meta", table, now, old), room, 0, "kv")
    made.drain()
    return made


class _Nowhere:
    """An exchange whose messages arrive at once and hold nothing."""

    def __init__(self, ranks: int) -> None:
        nobody: Any = None
        self.group = PatchGroup(nobody, 0, ranks)

    def all_gather(self, payload: torch.Tensor, output: torch.Tensor, kind: str, where: str) -> _Arrived:
        return _Arrived(output)


@dataclass(frozen=True)
class _Arrived:
    output: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.output
