"""`otil-xdit memory`: how many bytes a rank keeps for the exchange. Nothing is computed: all tensors are on "meta".

The figures are read from the layers that a run would make, which are made here and called twice: nothing is estimated.

Shapes: N ranks, B batch, S tokens of one rank, C features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from otil_xdit.config import OtilConfig
from otil_xdit.exchange import PatchGroup
from otil_xdit.kv import KVStack
from otil_xdit.picking import Picker
from otil_xdit.planner.networks import META, Layer
from otil_xdit.schedule import Clock, Mode
from otil_xdit.workspace import Workspace


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


def memory_of(layers: Sequence[Layer], ranks: int, batch: int, dtype: torch.dtype, config: OtilConfig) -> Memory:
    """What one rank keeps for these layers under `config`, after a synchronous step and another one."""
    largest, kept, room = 0, Counter[str](), Workspace(META)
    for stack in _stacks(layers, ranks, batch, dtype, config, room):
        count = len(stack.names)
        largest = max(largest, stack.nbytes // count)
        values, *velocities = (count * tensor.nbytes for tensor in stack.shared_state(0))
        kept["values"] += values
        kept["velocities"] += sum(velocities)
        kept["buffers"] += stack.nbytes - values - sum(velocities)
    return Memory(largest, kept["values"], kept["velocities"], kept["buffers"], room.sizes)


def _stacks(
    layers: Sequence[Layer], ranks: int, batch: int, dtype: torch.dtype, config: OtilConfig, room: Workspace
) -> list[KVStack]:
    """The layers' stacks after two steps, as `otil_xdit.run.OtilRun` makes them."""
    nowhere, made = _Nowhere(ranks), list[KVStack]()
    picker = Picker(config, Clock(), nowhere.group)
    for number, layer in enumerate(layers):
        picker.observe(None, layer.layout)
        shape, table = torch.Size((2, batch, layer.tokens, layer.width)), picker.table(layer.tokens, META)
        if not made or not made[-1].fits(shape, dtype, table):
            exchange: Any = nowhere  # it has what stacks ask of one
            made.append(KVStack(exchange, shape, dtype, table, config, picker, room))
        made[-1].join(str(number))
    for stack in made:
        _, batch, tokens, width = stack.shape
        values = torch.empty(batch, 1, tokens, width, dtype=dtype, device=META)
        modes: list[Mode] = (
            ["sync", "sync", config.freshness] if config.warmup_steps > 1 else ["sync", config.freshness]
        )
        for mode in modes:
            for place in range(len(stack.names)):
                stack.gather(place, values, values, mode, 0, "kv")
            stack.seal()
        stack.drain()
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
