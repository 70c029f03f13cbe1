"""`otil-xdit memory`: how many bytes a rank keeps for the exchange. Nothing is computed: all tensors are on "meta".

The figures are read from the objects of a run that nobody else takes part in: nothing is estimated.

Shapes: N ranks, B batch, S tokens of one rank, C features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.dryrun.networks import META, Layer
from otil_xdit.dryrun.recorder import Log, RecordedCollectives
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.window import NONE


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
    """What one rank keeps for these layers, in the order of their calls, once every kind of step has been made."""
    # A step that does not wait takes the most: all layers of a message at once. Nobody predicts anything here.
    steady = config.replace(
        warmup_steps=min(2, config.warmup_steps), fresh_share=0.0, window=NONE, requires_cfg_parallel=False
    )
    nobody: Any = None
    run = OtilCommunicator(steady, PatchGroup(nobody, 0, ranks), partial(RecordedCollectives, log=Log()))
    run.begin()
    for _ in range(steady.warmup_steps + 2):
        for number, layer in enumerate(layers):
            run.observe(None, layer.layout)
            values = torch.empty(batch, layer.heads, layer.tokens, layer.width // layer.heads, dtype=dtype, device=META)
            run.gather(str(number), values, values)
        run.clock.tick()
    run.end()
    largest, kept = 0, Counter[str]()
    for group in run.kv.groups:
        count = len(group.names)
        largest = max(largest, group.nbytes // count)
        values_of, *velocities = (count * tensor.nbytes for tensor in group.shared_state(0))
        kept["values"] += values_of
        kept["velocities"] += sum(velocities)
        kept["buffers"] += group.nbytes - values_of - sum(velocities)
    return Memory(largest, kept["values"], kept["velocities"], kept["buffers"], run.scratch_sizes)
