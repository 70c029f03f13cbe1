"""The time of a step, from what one process needs for it, from the link, and from what is sent.

    step = computing + handling + waiting + max(0, travelling - (computing + handling))

computing
    What one process needs, times the share of the work that the busiest rank has, times `slowdown`. The share is that
    of the tallest patch among the rows (1 / ranks where they divide), halved where CFG parallelism halves the batch.
    `slowdown` is what is lost by computing on a part: smaller matrices, what every rank does by itself (text, time),
    cores and memory shared by the ranks of one host. 1 is a perfect split.
handling
    `per_message` seconds of the host for each message, and `per_number` seconds for each key and value, of all
    patches, in steps in which they are predicted and coded (not under `sync`, `distrifusion`, `naive`).
waiting
    For messages that a layer waits for at once: one latency, and what its messages put on the wire over the link's
    rate. An all-gather on N ranks brings N - 1 payloads to each rank. Messages of one request go together.
travelling
    The same of what is sent for the next step. It is hidden behind the step's own work as far as that lasts, so only
    the rest counts.

Link and `slowdown`, `per_message`, `per_number` are a `Machine`; with no measurements the last three are 1, 0 and 0,
and the prediction is that of the link alone. Not in the model: ranks that wait for a slower one, and a link that
messages of several requests share at the same moment.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from otil_xdit.grid import LevelGrid
from otil_xdit.planner.asks import Composition, Job
from otil_xdit.planner.links import Link
from otil_xdit.planner.recorder import FOREIGN, Message
from otil_xdit.planner.traffic import RunTraffic, StepTraffic
from otil_xdit.unet.structure import Levels


@dataclass(frozen=True)
class Machine:
    """What a prediction needs to know of the hardware; the terms are explained at the top of this file.

    Attributes:
        link: what joins the ranks.
        slowdown: of computing on a part.
        per_message, per_number: seconds.
    """

    link: Link
    slowdown: float = 1.0
    per_message: float = 0.0
    per_number: float = 0.0


@dataclass(frozen=True)
class Load:
    """What the model reads of a step.

    Attributes:
        share: of one process's computing that the busiest rank does; 1 on one process.
        messages: that a rank sends.
        numbers: keys and values that are predicted and coded.
        waits: requests that are waited for at once.
        waited_bytes: on the wire, of those.
        travels: messages for the next step.
        travelling_bytes: on the wire, of those.
    """

    share: float
    messages: int = 0
    numbers: int = 0
    waits: int = 0
    waited_bytes: float = 0.0
    travels: int = 0
    travelling_bytes: float = 0.0


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


def share_of(job: Job, composition: Composition) -> float:
    """The part of one process's computing that falls to the busiest rank."""
    batch = 1 / composition.cfg if job.batch % composition.cfg == 0 else 1.0
    ranks = composition.patches * composition.ulysses
    if not job.network.is_unet:
        return batch / ranks
    rows, cols = job.latent
    grid = LevelGrid.build(rows, cols, Levels(job.network.module).count, ranks)
    return batch * max(grid.rows[0]) / rows


def load_of(traffic: StepTraffic, share: float) -> Load:
    """What the model reads of a step in which a rank sends `traffic`."""
    waits: defaultdict[int, float] = defaultdict(float)
    travelling: list[Message] = []
    for place, message in enumerate(traffic.log):
        if message.awaited:
            alone = message.ask == FOREIGN
            waits[-1 - place if alone else message.ask] += message.wire_bytes
        else:
            travelling.append(message)
    return Load(
        share,
        len(traffic.log),
        traffic.numbers,
        len(waits),
        sum(waits.values()),
        len(travelling),
        sum(message.wire_bytes for message in travelling),
    )


def step_time(load: Load, machine: Machine, one_process: float) -> StepTime:
    """The time of a step whose computing takes one process `one_process` seconds."""
    link = machine.link
    computing = one_process * load.share * (machine.slowdown if load.share < 1 else 1.0)
    handling = load.messages * machine.per_message + load.numbers * machine.per_number
    waiting = load.waits * link.latency + load.waited_bytes / link.rate
    travelling = load.travels * link.latency + load.travelling_bytes / link.rate
    return StepTime(computing, handling, waiting, max(0.0, travelling - computing - handling))


def run_time(run: RunTraffic, share: float, machine: Machine, one_process: float) -> float:
    """Seconds of all steps of a run."""
    times = {mode: step_time(load_of(step, share), machine, one_process).total for mode, step in run.steps.items()}
    return sum(times[mode] for mode in run.modes)
