"""The time of a step, from what one process needs for it, from the link, and from what is sent.

    step = work + waiting + max(0, travelling - work)            work = computing + handling

computing
    What one process needs, times the share of the work that the busiest rank has, times `slowdown`. The share is that
    of the tallest patch among the rows (1 / ranks where they divide), halved where CFG parallelism halves the batch;
    in two stages of that the longer segment's.
    `slowdown` is what is lost by computing on a part: smaller matrices, what every rank does by itself (text, time),
    memory shared by the ranks of one host. 1 is a perfect split.
handling
    What the exchange costs a rank besides waiting: `per_ask` seconds for each request of a layer (halo rows, moments,
    keys and values), whether anything is sent for it or not; `per_message` for each message; for what is sent for the
    next step, while the rank computes, `per_byte` for each byte (copies) and `contention` for each second of
    travelling: as long as the link is busy, the network stack and the threads of the collectives' library take turns
    with computing on the rank's core. What is waited for is handled while nothing is computed, so the link's time has
    that in it. In steps in which keys and values are predicted, picked or coded (not under `sync`, `distrifusion`,
    `naive`) there are `per_layer` for each attention layer and `per_number` for each of them, of all patches.
waiting
    For messages that a layer waits for at once: what the link takes for each request, one after the other. Messages of
    one request go together. An all-gather on N ranks brings N - 1 payloads to each rank.
travelling
    A latency for each message that is sent for the next step, and their bytes over the link's rate. It is hidden behind
    the step's own work as far as that lasts, so only the rest counts.

Work takes `ranks / cores` times as long where ranks outnumber the cores of their host. Link, `cores` and the terms are
a `Machine`; without measurements nothing is lost and nothing costs anything but the link. Not in the model: ranks that
wait for a slower one, requests that share the link at one moment, and when in a step a message leaves and is wanted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from otil_xdit.dryrun.job import Job, ParallelDegrees
from otil_xdit.dryrun.recorder import FOREIGN, Message
from otil_xdit.dryrun.traffic import RunTraffic, StepTraffic
from otil_xdit.method.grid import LevelGrid
from otil_xdit.networks.unet.levels import Levels
from otil_xdit.tools.common.links import Link


@dataclass(frozen=True)
class Machine:
    """What a prediction needs to know of the hardware; the terms are explained at the top of this file.

    Attributes:
        link: what joins the ranks.
        slowdown: of computing on a part.
        per_ask, per_message, per_byte, per_layer, per_number: seconds.
        contention: seconds for a second of travelling.
        cores: that all ranks share; None where each has its own device.
    """

    link: Link
    slowdown: float = 1.0
    per_ask: float = 0.0
    per_message: float = 0.0
    per_byte: float = 0.0
    per_layer: float = 0.0
    per_number: float = 0.0
    contention: float = 0.0
    cores: int | None = field(default=None, kw_only=True)

    @property
    def costs(self) -> tuple[float, ...]:
        """Of handling, in the order above."""
        return self.per_ask, self.per_message, self.per_byte, self.per_layer, self.per_number, self.contention

    def crowding(self, ranks: int) -> float:
        """Ranks of a core, as far as there are more of them."""
        return 1.0 if self.cores is None else max(1.0, ranks / self.cores)


@dataclass(frozen=True)
class Load:
    """What the model reads of a step.

    Attributes:
        ranks: that work on the image.
        share: of one process's computing that the busiest one does; 1 on one process.
        asks: requests of layers.
        messages: that a rank sends.
        layers, numbers: attention layers whose keys and values are predicted and coded, and those.
        waited: of each request that is waited for at once the bytes on the wire.
        swapped: the same of all-to-alls.
        travels: messages for the next step.
        travelling_bytes: on the wire, of those.
    """

    ranks: int
    share: float
    asks: int = 0
    messages: int = 0
    layers: int = 0
    numbers: int = 0
    waited: tuple[float, ...] = ()
    swapped: tuple[float, ...] = ()
    travels: int = 0
    travelling_bytes: float = 0.0

    def counts(self, link: Link) -> tuple[float, ...]:
        """What the costs of handling are multiplied by, in their order in `Machine`."""
        return self.asks, self.messages, self.travelling_bytes, self.layers, self.numbers, self.on(link)[1]

    def on(self, link: Link) -> tuple[float, float]:
        """Seconds of waiting and of travelling."""
        swapping = link.swapping * sum(map(link.seconds, self.swapped))
        travelling = self.travels * link.latency + self.travelling_bytes / link.rate
        return sum(map(link.seconds, self.waited)) + swapping, travelling


@dataclass(frozen=True)
class StepTime:
    """Seconds, by the terms of the model; `late` is what of travelling is not hidden."""

    computing: float
    handling: float
    waiting: float
    late: float

    @property
    def total(self) -> float:
        return self.computing + self.handling + self.waiting + self.late


def share_of(job: Job, composition: ParallelDegrees) -> float:
    """The part of one process's computing that falls to the busiest rank."""
    batch = 1 / composition.cfg if job.batch % composition.cfg == 0 else 1.0
    ranks = composition.patches * composition.ulysses
    if not job.network.is_unet:
        return batch / ranks
    rows, cols = job.latent
    grid = LevelGrid.build(rows, cols, Levels(job.network.module).count, ranks)
    return batch * max(grid.rows[0]) / rows


def load_of(traffic: StepTraffic, ranks: int, share: float) -> Load:
    """What the model reads of a step in which one of `ranks` ranks sends `traffic`; `share` as in `share_of`."""
    waits: defaultdict[int, float] = defaultdict(float)
    swapped: list[float] = []
    travelling: list[Message] = []
    for place, message in enumerate(traffic.log):
        if not message.awaited:
            travelling.append(message)
        elif message.pattern == "all-to-all":
            swapped.append(message.wire_bytes)
        else:
            alone = message.request == FOREIGN
            waits[-1 - place if alone else message.request] += message.wire_bytes
    return Load(
        ranks,
        share * traffic.share,
        traffic.requests,
        len(traffic.log),
        traffic.layers,
        traffic.numbers,
        tuple(waits.values()),
        tuple(swapped),
        len(travelling),
        sum(message.wire_bytes for message in travelling),
    )


def step_time(load: Load, machine: Machine, one_process: float) -> StepTime:
    """The time of a step whose computing takes one process `one_process` seconds."""
    crowding = machine.crowding(load.ranks)
    computing = crowding * one_process * load.share * (machine.slowdown if load.ranks > 1 else 1.0)
    handling = crowding * sum(
        cost * count for cost, count in zip(machine.costs, load.counts(machine.link), strict=True)
    )
    waiting, travelling = load.on(machine.link)
    return StepTime(computing, handling, waiting, max(0.0, travelling - computing - handling))


def run_time(run: RunTraffic, loads: Mapping[str, Load], machine: Machine, one_process: float) -> float:
    """Seconds of all steps of a run, whose steps of each mode are `loads`."""
    times = {mode: step_time(load, machine, one_process).total for mode, load in loads.items()}
    return sum(times[mode] for mode in run.modes)
