"""Bytes and messages of every step of a run, and the size of its buffers: counted by the run's own code, on "meta".

Steps of one mode send the same, so one step of each mode is replayed and the others are counted with it. (A window
that begins during warm-up sends the same, and some of it is then counted under another name.)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch

from otil_xdit.comm.collectives import ByKind, CollectiveLabel, CounterKey, by_kind
from otil_xdit.dryrun.job import Job, ParallelDegrees, Pass
from otil_xdit.dryrun.launches import LaunchCounter, Launches
from otil_xdit.dryrun.recorder import FOREIGN, Log, Message, RecordedCollectives
from otil_xdit.dryrun.requests import replay, requests_of
from otil_xdit.dryrun.segments import Segments, segments_of
from otil_xdit.dryrun.stand_ins import dry_communicator, patch_group
from otil_xdit.dryrun.step_modes import STAGED, WARMUP, is_staged, modes_of, steady_config, window_of
from otil_xdit.exchange.pass_agreement import PassAgreement
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.kernels import fused_on
from otil_xdit.method.window import AUTO

_NUMBER = 8
"""Bytes of an int64 or a float64."""


@dataclass(frozen=True)
class StepTraffic:
    """What one rank sends in a step.

    Attributes:
        sent, messages: by counter.
        log: all messages in order, xDiT's own at the end.
        requests: number of the layers' requests.
        layers: number of attention layers whose keys and values predictor and codec handle in the step.
        numbers: how many keys and values these are, of all patches.
        share: part of a whole call of the network that the busiest rank computes.
        launches: number of kernels of network and exchange together, and the bytes that the exchange's alone move;
            where they were counted.
    """

    sent: Mapping[CounterKey, int]
    messages: Mapping[CounterKey, int]
    log: tuple[Message, ...]
    requests: int = 0
    layers: int = 0
    numbers: int = 0
    share: float = 1.0
    launches: Launches = Launches()

    def bytes_of(self, what: str) -> int:
        """Return the bytes of one kind: ``kv``, ``halo``, ``moments``, ``output``, ``stages`` or ``ulysses``."""
        counted = sum(nbytes for key, nbytes in self.sent.items() if key.kind == what)
        return counted + sum(
            message.nbytes for message in self.log if message.request == FOREIGN and message.kind == what
        )


@dataclass(frozen=True)
class RunTraffic:
    """What one rank sends in a run, and keeps.

    Attributes:
        modes: of each step, in order.
        steps: traffic of a step of each mode.
        buffer_bytes: as `otil_xdit.exchange.report.Report` has it.
        once: bytes of each message, by counter, that no step sends by itself.
        missing: the same of messages that a step sends but for the last of its mode.
    """

    modes: tuple[str, ...]
    steps: Mapping[str, StepTraffic]
    buffer_bytes: int
    once: Mapping[CounterKey, Sequence[int]]
    missing: Mapping[CounterKey, Sequence[int]] = field(default_factory=dict)

    @property
    def sent_bytes(self) -> ByKind:
        """Return the bytes of the whole run, as `otil_xdit.exchange.report.Report` has them."""
        return self._summed(sum, [self.steps[mode].sent for mode in self.modes])

    @property
    def messages(self) -> ByKind:
        """Return the messages of the whole run, likewise."""
        return self._summed(len, [self.steps[mode].messages for mode in self.modes])

    def _summed(self, of: Callable[[Sequence[int]], int], steps: Sequence[Mapping[CounterKey, int]]) -> ByKind:
        """Return the sums over all steps, and what is counted of the other messages."""
        total = Counter[CounterKey]()
        for count in steps:
            total.update(count)
        total.update({key: of(sizes) for key, sizes in self.once.items()})
        total.subtract({key: of(sizes) for key, sizes in self.missing.items()})
        return by_kind(total)


class Traffic:
    """Counts what one rank sends under any settings.

    Args:
        job: the step.
        degrees: of the ranks that share it.
        place: the rank's, from the top of the image; None for one that sends most.
        cfg_rank: the rank's CFG group: in two stages 0 computes the first segment and sends its output, 1 the second.
        counts_launches: whether to count kernels as well, which takes longer; bytes that are kept are then those on
            CUDA.

    Raises:
        ValueError: where so many ranks cannot share the job.
    """

    def __init__(
        self,
        job: Job,
        degrees: ParallelDegrees,
        place: int | None = None,
        cfg_rank: int = 0,
        counts_launches: bool = False,
    ) -> None:
        # A rank in the middle has two neighbours; of two ranks the upper one sends the row that a stride of 2 reads.
        self.place = min(1, max(degrees.rows - 2, 0)) if place is None else place
        self.degrees = degrees
        self._job, self._cfg_rank, self._counts_launches = job, cfg_rank, counts_launches
        self._whole = self._call_of_network(calls_blocks=False)
        self._known: dict[tuple[OtilConfig, int, str, int], tuple[StepTraffic, StepTraffic, int, Counter[str]]] = {}

    def _call_of_network(self, calls_blocks: bool) -> Pass:
        return requests_of(
            self._job, self.degrees, self.place, counts_launches=self._counts_launches, calls_blocks=calls_blocks
        )

    @cached_property
    def _whole_beside_stages(self) -> Pass:
        """A whole call in a run that has steps in two stages, too."""
        return self._call_of_network(calls_blocks=True) if self._job.network.controls else self._whole

    @cached_property
    def _segments(self) -> Segments:
        return segments_of(self._job, self.degrees, self.place)

    @property
    def shows_latent(self) -> bool:
        """Tell whether the communicator sees rows of the latent; with packed tokens nobody knows whose they are."""
        return any(method == "observe" and args[0] is not None for method, args in self._whole.requests)

    def of_run(self, config: OtilConfig, steps: int, window: Sequence[int] | None = None) -> RunTraffic:
        """Return what a run under `config` sends.

        Args:
            config: the settings.
            steps: number of steps.
            window: where it was found, as for `modes_of`.

        Raises:
            ValueError: as `modes_of` and `segments_of`.
        """
        is_unet = self._job.network.is_unet
        modes, begins = modes_of(config, steps, is_unet, window), window_of(config, steps, is_unet, window).start
        whole = self._whole_beside_stages if config.requires_cfg_parallel else self._whole
        found: dict[str, StepTraffic] = {}
        kept, scratch = 0, Counter[str]()
        # A warm-up step comes before every other, so only a run of nothing else replays it for its own sake.
        for mode in list(dict.fromkeys(mode for mode in modes if mode != WARMUP)) or [WARMUP]:
            steady = steady_config(config, mode)
            # Three displaced steps: payloads arrive in the second, and buffers are used again from the third on.
            # Of other modes the second is like all that follow, also in what it launches.
            # In the second that waits passes of guidance agree on all gains, and in the first on each by itself.
            others = 1 + (self._counts_launches or (mode == "fresh" and self._agrees(config)))
            count = steady.warmup_steps + {WARMUP: 0, "displaced": 3}.get(mode, others)
            found[WARMUP], found[mode], nbytes, sizes = self._replayed(steady, count, mode, whole)
            kept, scratch = max(kept, nbytes), scratch | sizes  # the largest of each name
        total = kept + sum(scratch.values())
        if config.requires_cfg_parallel:
            total += 2 * self._segments.boundary.memory.nbytes
            total += self._segments.prompt if any(map(is_staged, modes)) else 0
        once, gains = self._once(config, modes, begins), self._gains() if self._agrees(config) else []
        first = next((step for step, mode in enumerate(modes) if mode in ("fresh", "displaced")), len(modes))
        if gains and first < len(modes):
            once[CounterKey("kv", "warmup" if first < config.warmup_steps else "steady")] = gains
        # Of a step that is the last one nobody asks for the gains.
        missing = {CounterKey("kv", "steady"): [sum(gains)]} if gains and modes[-1] == "fresh" else {}
        return RunTraffic(modes, {mode: found[mode] for mode in dict.fromkeys(modes)}, total, once, missing)

    def _agrees(self, config: OtilConfig) -> bool:
        """Tell whether the ranks of either pass of guidance agree on gains."""
        return self.degrees.cfg > 1 and PassAgreement.serves(config) and config.extrapolation == "fitted"

    def _gains(self) -> list[int]:
        """Return the bytes of each layer's gains, one of keys and one of values."""
        return [2 * torch.float32.itemsize for method, _ in self._whole.requests if method == "gather"]

    def _replayed(
        self, config: OtilConfig, count: int, mode: str, whole: Pass
    ) -> tuple[StepTraffic, StepTraffic, int, Counter[str]]:
        """Replay `count` steps, the last of them of `mode` and those before it a `whole` call of the network.

        Returns:
            The traffic of the first step and of the last; the bytes that layers keep, and those of scratch buffers.
        """
        known = config, count, mode, id(whole)
        if known not in self._known:
            log = Log()
            run = dry_communicator(config, self.degrees, self.place, log)
            replica = RecordedCollectives(
                patch_group(self.degrees, self.place), config.timeout, run.collectives.traffic, log=log
            )
            run.begin()
            steps, launches = [], dict[int, Launches]()
            in_stages = is_staged(mode)
            last = self._segments.passes[self._cfg_rank] if in_stages else whole
            warmup = max(config.warmup_steps - 1, 0)  # the last one, when all buffers are there
            for number, made in enumerate([*[whole] * (count - 1), last]):
                traffic, first = run.collectives.traffic, len(log.messages)
                traffic.clear()
                counter = LaunchCounter() if self._counts_launches and number in (warmup, count - 1) else None
                with fused_on("meta") if self._counts_launches else nullcontext(), counter or nullcontext():
                    replay(made.requests, run, log, counter)
                if counter is not None:
                    launches[number] = counter.found
                if made is last and mode == STAGED and self._cfg_rank == 0:
                    replica.send(self._segments.boundary.memory, 1, CollectiveLabel("stages", "the boundary", None))
                messages = (*log.messages[first:], *made.messages)
                steps.append((Counter(traffic.sent), Counter(traffic.messages), messages))
                run.clock.tick()
            run.end()
            coded, share = self._coded(config, whole), self._segments.share if in_stages else 1.0
            network, none = whole.launches, Launches()
            first_launches = launches.get(warmup, none) + Launches(network)
            last_launches = launches.get(count - 1, none) + Launches(round(share * network))
            first_step = StepTraffic(*steps[0], _count(whole), *coded[0], launches=first_launches)
            last_step = StepTraffic(*steps[-1], _count(last), *coded[1], share, last_launches)
            kept = run.report().buffer_bytes - sum(run.scratch_sizes.values())
            self._known[known] = (first_step, last_step, kept, Counter(run.scratch_sizes))
        return self._known[known]

    def _coded(self, config: OtilConfig, made: Pass) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return how many attention layers, and keys and values, predictor and codec handle in a warm-up step and after
        it."""
        own = [2 * args[1].numel() for method, args in made.requests if method == "gather"]
        whole = len(own), sum(own) * self.degrees.patches
        codes = config.codec != "raw" or config.extrapolation != "none" or config.ratio < 1
        warmup = config.warmup_codec != "raw" and config.freshness != "sync"
        later = codes and config.freshness in ("fresh", "displaced") and not config.refresh
        return whole if warmup else (0, 0), whole if later else (0, 0)

    def _once(self, config: OtilConfig, modes: Sequence[str], begins: int) -> dict[CounterKey, list[int]]:
        """Return the bytes of each message that no step sends by itself, by counter.

        They are the generator's state, by which a U-Net's ranks draw alike; what finds the cut; the prompt; how far
        predictions differ: of a step while the window is looked for, and of all steps where a rank sees its own rows
        only.
        """
        found: defaultdict[CounterKey, list[int]] = defaultdict(list)
        if self._job.network.is_unet:
            found[CounterKey("random-state", "warmup")].append(torch.get_rng_state().nbytes)
        if config.requires_cfg_parallel:
            found[CounterKey("stages", "warmup")].append(_NUMBER * (self._segments.blocks + 1))
            if self._cfg_rank == 1 and self._segments.prompt and any(map(is_staged, modes)):
                found[CounterKey("prompt")].append(self._segments.prompt)
        if config.window == AUTO:
            # Steps are counted when they are done, so the first is told of at the second's.
            for done in range(1, begins + 1):
                found[_discrepancy(config, done)].append(2 * _NUMBER)
        if self._job.is_guided and not self._job.network.is_unet and self.degrees.rows > 1:
            seen = sum(not is_staged(mode) for mode in modes)
            found[_discrepancy(config, len(modes))].append(2 * _NUMBER * seen)
        return dict(found)


def _count(made: Pass) -> int:
    """Count the layers' requests; a norm's moments and its convolution's rows are two, however they travel."""
    return sum({"observe": 0, "count": 0, "norm_halo": 2}.get(method, 1) for method, _ in made.requests)


def _discrepancy(config: OtilConfig, done: int) -> CounterKey:
    """Return the counter of the predictions' discrepancy when so many steps are done."""
    return CounterKey("discrepancy", "warmup" if done < config.warmup_steps else "steady")
