"""The time of a step, from what one process needs for it, from the link, and from what is sent.

    step = work + waiting + max(0, travelling - work)        work = max(computing, launching) + moving + handling

computing
    What one process needs, times the share of the work that the busiest rank has, times `slowdown`. The share is that
    of the tallest patch among the rows (1 / ranks where they divide), halved where CFG parallelism halves the batch;
    in two stages of that the longer segment's.
    `slowdown` is what is lost by computing on a part: smaller matrices, what every rank does by itself (text, time),
    memory shared by the ranks of one host. 1 is a perfect split.
launching, moving
    Of a named card (`otil_xdit.tools.common.cards`), in the place of `handling`: what the host needs to launch all
    kernels of a step, network and exchange, which the card computes meanwhile; and what the card's memory takes for the
    bytes that the exchange moves. Both are counted in the dry run. Without a card they are 0.
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
from dataclasses import dataclass, field

from otil_xdit.dryrun.job import Job, ParallelDegrees
from otil_xdit.dryrun.recorder import FOREIGN
from otil_xdit.dryrun.traffic import StepTraffic
from otil_xdit.method.grid import LevelGrid
from otil_xdit.networks.unet.levels import Levels
from otil_xdit.tools.common.cards import Card
from otil_xdit.tools.common.links import Link

TERMS = ("slowdown", "per_ask", "per_message", "per_byte", "per_layer", "per_number", "contention")
"""What work is linear in; they are explained at the top of this file, and in the order of `Load.features`."""


@dataclass(frozen=True)
class Machine:
    """What a prediction needs to know of the hardware.

    Attributes:
        link: what joins the ranks.
        slowdown: of computing on a part, a factor.
        per_ask, per_message, per_byte, per_layer, per_number: seconds.
        contention: seconds for a second of travelling.
        cores: that all ranks share; None where each has its own device.
        card: of each rank; None where launching and moving are not in the model.
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
    card: Card | None = field(default=None, kw_only=True)

    @property
    def terms(self) -> tuple[float, ...]:
        """Return the terms in the order of `TERMS`."""
        return tuple(getattr(self, term) for term in TERMS)


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
        launches: kernels of network and exchange.
        moved: bytes that the exchange reads and writes.
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
    launches: int = 0
    moved: int = 0

    @classmethod
    def of(cls, traffic: StepTraffic, ranks: int, share: float) -> Load:
        """Return the load of a step in which one of `ranks` ranks sends `traffic`; `share` as in `share_of`."""
        waited: defaultdict[int, float] = defaultdict(float)
        for place, message in enumerate(traffic.log):
            if message.awaited and message.pattern != "all-to-all":
                request = -1 - place if message.request == FOREIGN else message.request
                waited[request] += message.wire_bytes
        swapped = (one.wire_bytes for one in traffic.log if one.awaited and one.pattern == "all-to-all")
        travelling = [one.wire_bytes for one in traffic.log if not one.awaited]
        return cls(
            ranks,
            share * traffic.share,
            traffic.requests,
            len(traffic.log),
            traffic.layers,
            traffic.numbers,
            tuple(waited.values()),
            tuple(swapped),
            len(travelling),
            sum(travelling),
            traffic.launches.count,
            traffic.launches.nbytes,
        )

    def waiting(self, link: Link) -> float:
        """Return the seconds that layers wait for messages."""
        return sum(map(link.seconds, self.waited)) + link.swapping * sum(map(link.seconds, self.swapped))

    def travelling(self, link: Link) -> float:
        """Return the seconds that messages for the next step are under way."""
        return self.travels * link.latency + self.travelling_bytes / link.rate

    def features(self, machine: Machine, one_process: float) -> list[float]:
        """Return what the terms are multiplied by to give work, in the order of `TERMS`; read are link and cores."""
        crowding = 1.0 if machine.cores is None else max(1.0, self.ranks / machine.cores)
        travelling = self.travelling(machine.link)
        counts = (self.asks, self.messages, self.travelling_bytes, self.layers, self.numbers, travelling)
        return [crowding * value for value in (one_process * self.share, *counts)]


@dataclass(frozen=True)
class StepTime:
    """Seconds, by the terms of the model.

    Attributes:
        computing, handling, waiting: as at the top of this file.
        late: what of travelling is not hidden.
        launching: what the host needs beyond computing.
        moving: as at the top of this file.
    """

    computing: float
    handling: float
    waiting: float
    late: float
    launching: float = 0.0
    moving: float = 0.0

    @property
    def total(self) -> float:
        """Return the seconds of the step."""
        return self.computing + self.launching + self.moving + self.handling + self.waiting + self.late


def share_of(job: Job, degrees: ParallelDegrees) -> float:
    """Return the part of one process's computing that falls to the busiest rank."""
    batch = job.batch_of_rank(degrees) / job.batch
    rows, cols = job.latent
    if job.network.is_unet:
        levels = Levels(job.network.module).count
        parts = LevelGrid.build(rows, cols, levels, degrees.rows, degrees.cut.rank_shares).rows[0]
    else:
        parts = degrees.cut.sizes(rows * cols // job.network.patch**2)
    speeds = degrees.speeds or [share / max(degrees.shares) for share in degrees.shares] or (1,) * degrees.patches
    times = [part / speeds[place // degrees.ulysses] for place, part in enumerate(parts)]
    return batch * max(times) / sum(parts)


def step_time(load: Load, machine: Machine, one_process: float) -> StepTime:
    """Predict the time of a step.

    Args:
        load: of the step.
        machine: with the link that joins the ranks.
        one_process: seconds that one process computes in it.
    """
    slowdown, *costs = machine.terms
    alone, *counts = load.features(machine, one_process)
    computing = alone * (slowdown if load.ranks > 1 else 1.0)
    handling = sum(cost * count for cost, count in zip(costs, counts, strict=True))
    launching = moving = 0.0
    if machine.card is not None:
        launching = max(0.0, load.launches * machine.card.launch - computing)
        moving = load.moved / machine.card.memory_rate
    work = computing + launching + moving + handling
    late = max(0.0, load.travelling(machine.link) - work)
    return StepTime(computing, handling, load.waiting(machine.link), late, launching, moving)
