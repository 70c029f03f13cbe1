"""`otil-xdit memory`: bytes that a rank keeps for the exchange of keys and values.

The figures are read from the run's own objects, made without other ranks and on "meta": nothing is estimated, and
nothing is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from otil_xdit.dryrun.job import ParallelDegrees, Request
from otil_xdit.dryrun.networks import META, Layer
from otil_xdit.dryrun.recorder import Log
from otil_xdit.dryrun.requests import replay
from otil_xdit.dryrun.stand_ins import dry_communicator
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.window import NONE


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        largest: of one layer; all others are of all layers.
        values: last keys and values of every patch.
        velocities: their velocities, with the ages of tokens.
        buffers: payloads to send and received ones.
        scratch: buffers that all layers use in turn, by name; not part of `total`.
    """

    largest: int
    values: int
    velocities: int
    buffers: int
    scratch: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of what layers keep."""
        return self.values + self.velocities + self.buffers


def memory_of(layers: Sequence[Layer], ranks: int, batch: int, dtype: torch.dtype, config: OtilConfig) -> Memory:
    """Return what one rank keeps once steps of every mode have been made.

    Args:
        layers: attention layers, in the order of their calls.
        ranks: number of patches.
        batch: images in one pass.
        dtype: of keys and values.
        config: the settings.
    """
    # A step that does not wait takes the most: all layers of a message at once. Nobody predicts anything here.
    steady = config.replace(
        warmup_steps=min(2, config.warmup_steps), fresh_share=0.0, window=NONE, requires_cfg_parallel=False
    )
    log = Log()
    run = dry_communicator(steady, ParallelDegrees(patches=ranks), 0, log)
    requests: list[Request] = []
    for number, layer in enumerate(layers):
        values = torch.empty(batch, layer.heads, layer.tokens, layer.width // layer.heads, dtype=dtype, device=META)
        requests += [("observe", (None, layer.layout)), ("gather", (str(number), values, values))]
    run.begin()
    for _ in range(steady.warmup_steps + 2):
        replay(requests, run, log)
        run.clock.tick()
    run.end()
    largest, kept = 0, Counter[str]()
    for kv_group in run.kv.groups:
        count = len(kv_group.names)
        largest = max(largest, kv_group.nbytes // count)
        values_of, *velocities = (count * tensor.nbytes for tensor in kv_group.shared_state(0))
        kept["values"] += values_of
        kept["velocities"] += sum(velocities)
    kept["buffers"] = run.kv.nbytes - kept["values"] - kept["velocities"]
    return Memory(largest, kept["values"], kept["velocities"], kept["buffers"], run.scratch_sizes)
