"""Bytes and messages of every step of a run, and what its buffers take: counted by the run's own code, on "meta".

Steps that are exchanged alike send alike, so one of each way is replayed and the others are counted with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from otil_xdit.config import OtilConfig
from otil_xdit.exchange import PatchGroup
from otil_xdit.planner.asks import Composition, Job, asks_of, replay
from otil_xdit.planner.recorder import FOREIGN, Log, Message, RecordedExchange
from otil_xdit.run import OtilRun
from otil_xdit.schedule import Schedule

WARMUP = "warm-up"


@dataclass(frozen=True)
class StepTraffic:
    """What one rank sends in a step.

    Attributes:
        sent, messages: by counter, as `otil_xdit.run.Report` has them.
        log: all of it in order, xDiT's own messages at the end.
        asks: requests of layers.
        layers, numbers: attention layers whose keys and values predictor and codec handle in the step, and those of all
            patches.
    """

    sent: Mapping[str, int]
    messages: Mapping[str, int]
    log: tuple[Message, ...]
    asks: int = 0
    layers: int = 0
    numbers: int = 0

    def bytes_of(self, what: str) -> int:
        """Of ``kv``, ``halo``, ``moments`` or ``output`` in warm-up or after it; of ``ulysses``, too."""
        counted = sum(nbytes for kind, nbytes in self.sent.items() if kind.removesuffix("-warmup") == what)
        return counted + sum(message.nbytes for message in self.log if message.ask == FOREIGN and message.kind == what)


@dataclass(frozen=True)
class RunTraffic:
    """What one rank sends in a run, and keeps.

    Attributes:
        modes: of each step, in order.
        steps: what is sent in a step of each mode.
        buffer_bytes: as `otil_xdit.run.Report` has it.
        once: bytes, by counter, that are sent before the first step.
    """

    modes: tuple[str, ...]
    steps: Mapping[str, StepTraffic]
    buffer_bytes: int
    once: Mapping[str, int]

    @property
    def sent_bytes(self) -> dict[str, int]:
        """Of the whole run, by counter, as `otil_xdit.run.Report` has them."""
        return _summed([self.once, *(self.steps[mode].sent for mode in self.modes)])

    @property
    def messages(self) -> dict[str, int]:
        """Of the whole run, by counter."""
        return _summed([dict.fromkeys(self.once, 1), *(self.steps[mode].messages for mode in self.modes)])


def modes_of(config: OtilConfig, steps: int) -> tuple[str, ...]:
    """How each of `steps` steps is exchanged: `WARMUP`, or what `Schedule.mode` says.

    Raises:
        ValueError: for settings under which that is decided by what the network computes.
    """
    if config.tolerance:
        raise ValueError(f"tolerance is {config.tolerance:g}: which layers wait then depends on the picture; give 0")
    schedule = Schedule.from_config(config)
    named = (schedule.mode(step, step, steps if step else None) for step in range(steps))
    return tuple(WARMUP if step < config.warmup_steps else mode for step, mode in enumerate(named))


class Traffic:
    """Counts what one rank of a composition sends under any settings.

    Args:
        job: what is made.
        composition: by how many ranks.
        place: the rank's, from the top of the picture; None for one that sends most.

    Raises:
        ValueError: where so many ranks cannot share the job.
    """

    def __init__(self, job: Job, composition: Composition, place: int | None = None) -> None:
        rows = composition.patches * composition.ulysses
        # A rank in the middle has two neighbours; of two ranks the upper one sends the row that a stride of 2 reads.
        self.place = min(1, max(rows - 2, 0)) if place is None else place
        self.composition = composition
        self._job = job
        self._asks, self._others = asks_of(job, composition, self.place)
        self._known: dict[tuple[OtilConfig, int], tuple[StepTraffic, StepTraffic, int, Counter[str]]] = {}

    @property
    def shows_latent(self) -> bool:
        """Whether the communicator sees rows of the latent; with packed tokens nobody knows whose they are."""
        return any(method == "observe" and args[0] is not None for method, args in self._asks)

    def of_run(self, config: OtilConfig, steps: int) -> RunTraffic:
        """What a run of `steps` steps under `config` sends."""
        modes = modes_of(config, steps)
        found: dict[str, StepTraffic] = {}
        kept, rooms = 0, Counter[str]()
        # A warm-up step comes before every other, so only a run of nothing else replays it for its own sake.
        for mode in list(dict.fromkeys(mode for mode in modes if mode != WARMUP)) or [WARMUP]:
            steady = _steady(config, mode)
            # Three displaced steps: payloads arrive in the second, and buffers are used again from the third on.
            count = steady.warmup_steps + {WARMUP: 0, "displaced": 3}.get(mode, 1)
            found[WARMUP], found[mode], nbytes, sizes = self._replayed(steady, count)
            kept, rooms = max(kept, nbytes), rooms | sizes  # of each room the largest
        total = kept + sum(rooms.values())
        return RunTraffic(modes, {mode: found[mode] for mode in dict.fromkeys(modes)}, total, self._once())

    def _replayed(self, config: OtilConfig, count: int) -> tuple[StepTraffic, StepTraffic, int, Counter[str]]:
        """The first and the last of `count` steps, the bytes that layers keep, and those of rooms."""
        if (config, count) not in self._known:
            log = Log()
            run = OtilRun(config, self._group(), partial(RecordedExchange, log=log))
            run.begin()
            steps = []
            for _ in range(count):
                traffic, first = run.exchange.traffic, len(log.messages)
                traffic.clear()
                replay(self._asks, run, log)
                messages = (*log.messages[first:], *self._others)
                steps.append((Counter(traffic.sent), Counter(traffic.messages), messages))
                run.clock.tick()
            run.end()
            ends = zip((steps[0], steps[-1]), self._coded(config), strict=True)
            first_step, last_step = (StepTraffic(*step, self._count, *coded) for step, coded in ends)
            kept = run.report().buffer_bytes - sum(run.rooms.values())
            self._known[config, count] = (first_step, last_step, kept, Counter(run.rooms))
        return self._known[config, count]

    @property
    def _count(self) -> int:
        """Of the layers' requests; a norm's moments and its convolution's rows are two, however they travel."""
        return sum({"observe": 0, "norm_halo": 2}.get(method, 1) for method, _ in self._asks)

    def _coded(self, config: OtilConfig) -> tuple[tuple[int, int], tuple[int, int]]:
        """Attention layers, and their keys and values, that predictor and codec handle in a warm-up step and in one
        after it."""
        own = [2 * args[1].numel() for method, args in self._asks if method == "gather"]
        whole = len(own), sum(own) * self.composition.patches
        codes = config.codec != "raw" or config.predict != "none" or config.ratio < 1
        warmup = config.warmup_codec != "raw" and config.freshness != "sync"
        later = codes and config.freshness in ("fresh", "displaced") and not config.refresh
        return whole if warmup else (0, 0), whole if later else (0, 0)

    def _group(self) -> PatchGroup:
        nobody: Any = None
        shape = self.composition
        rows = PatchGroup(nobody, self.place, shape.patches * shape.ulysses)
        patch = self.place // shape.ulysses
        return PatchGroup(
            nobody, patch, shape.patches, shape.ulysses, rows, PatchGroup(nobody, self.place, shape.ranks)
        )

    def _once(self) -> dict[str, int]:
        """The generator's state, by which a U-Net's ranks draw alike."""
        return {"random-state-warmup": torch.get_rng_state().nbytes} if self._job.network.is_unet else {}


def _steady(config: OtilConfig, mode: str) -> OtilConfig:
    """Settings whose steps are of `mode`, as they are under `config`, after one or two of warm-up.

    The second warm-up step is the first that needs room for a velocity.
    """
    warmup = min(config.warmup_steps, 2)
    if mode == WARMUP or config.freshness == "sync":
        return config.replace(warmup_steps=warmup)
    if mode == "sync":
        return config.replace(warmup_steps=warmup, refresh=1)
    return config.replace(warmup_steps=warmup, refresh=0, freshness=mode, fresh_share=0.0)


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for count in counts:
        total.update(count)
    return dict(total)
