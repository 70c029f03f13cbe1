"""What `otil-xdit plan` compares: strategies on compositions of the ranks, with bytes, memory and time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from otil_xdit.dryrun.job import Job, ParallelDegrees
from otil_xdit.dryrun.traffic import RunTraffic, Traffic
from otil_xdit.method.config import OtilConfig
from otil_xdit.runtime.strategies import get_strategy, strategies
from otil_xdit.tools.plan.latency import Load, Machine, StepTime, load_of, run_time, share_of, step_time

LABELS = {"otil-paper": "otil-paper 1/8"}
"""Labels of strategies that are not their names."""

QUALITIES = {f"otil {quality}": ("otil", {"quality": quality}) for quality in ("draft", "high")}
"""By label: a strategy with other settings than its own."""

HYBRIDIFF = "hybridiff"
"""Label of what works in two stages on two halves of the ranks, with any number of patches."""

ULYSSES, CFG = "ulysses", "cfg"
"""Labels of what xDiT does without patches."""


def settings_by_label() -> dict[str, tuple[str, dict[str, str]]]:
    """Return every strategy between patches by label: the name that ``--parallel`` takes, and settings to change."""
    return {LABELS.get(name, name): (name, {}) for name in strategies()} | QUALITIES


@dataclass(frozen=True)
class Option:
    """One way to run a job.

    Attributes:
        label: of the strategy.
        composition: of the ranks.
        run: what is sent and kept.
        share: of one process's computing that the busiest rank does.
        times: predicted, of a step of each mode; empty where nothing is known of one process's step.
        seconds: of all steps, or None.
    """

    label: str
    composition: ParallelDegrees
    run: RunTraffic
    share: float
    times: dict[str, StepTime] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def is_exact(self) -> bool:
        return self.label in ("sync", ULYSSES, CFG)

    @property
    def loads(self) -> dict[str, Load]:
        return {mode: load_of(step, self.composition.ranks, self.share) for mode, step in self.run.steps.items()}

    @property
    def flags(self) -> list[str]:
        """Of `xfuser`, besides model, size and steps."""
        shape = self.composition
        name, given = settings_by_label().get(self.label, (None, {}))
        implied = name is not None and get_strategy(name).requires_cfg_parallel
        found = ["--use_cfg_parallel"] if shape.cfg > 1 and not implied else []
        found += ["--ulysses_degree", str(shape.ulysses)] if shape.ulysses > 1 else []
        if name is not None:
            others = [part for setting, value in given.items() for part in (f"--otil_{setting}", value)]
            found += ["--parallel", name, *others]
            found += ["--patch_degree", str(shape.patches)] if shape.patches > 1 else []
        return found


def compositions(gpus: int, job: Job, cfg: int | None, ulysses: int | None) -> list[ParallelDegrees]:
    """Every way to share `gpus` ranks out, as far as the degrees are not given.

    Raises:
        ValueError: for degrees that do not divide them, or guidance that one pass does.
    """
    if cfg == 2 and job.network.batch == 1:
        raise ValueError(f"--cfg_degree 2: {job.network.name} has no second pass without the prompt; give 1")
    halves = [cfg] if cfg else [1] if job.network.batch == 1 or job.batch % 2 else [1, 2]
    found = []
    for half in halves:
        for heads in [ulysses] if ulysses else range(1, gpus + 1):
            if gpus % (half * heads) == 0:
                found.append(ParallelDegrees(half, heads, gpus // (half * heads)))
    if not found:
        given = " ".join(f"--{name}_degree {value}" for name, value in (("cfg", cfg), ("ulysses", ulysses)) if value)
        raise ValueError(f"--gpus {gpus} cannot be shared out with {given}; give degrees whose product divides it")
    return found


def options_of(job: Job, shapes: list[ParallelDegrees], steps: int) -> tuple[list[Option], dict[ParallelDegrees, str]]:
    """Every strategy on every composition that fits, and why others do not.

    Raises:
        ValueError: where none fits.
    """
    found: list[Option] = []
    refused: dict[ParallelDegrees, str] = {}
    for shape in shapes:
        try:
            traffic = Traffic(job, shape)
        except ValueError as error:
            refused[shape] = str(error)
            continue
        share = share_of(job, shape)
        found += [Option(label, shape, run, share) for label, run in _runs(traffic, steps)]
        if shape.cfg == 2 and job.is_guided:
            try:
                found.append(Option(HYBRIDIFF, shape, _run(traffic, HYBRIDIFF, steps), share))
            except ValueError as error:
                refused[shape] = f"{HYBRIDIFF}: {error}"
    if not found:
        raise ValueError("; ".join(dict.fromkeys(refused.values())))
    return found, refused


def timed(option: Option, machine: Machine, one_process: float) -> Option:
    """The option with predictions."""
    times = {mode: step_time(load, machine, one_process) for mode, load in option.loads.items()}
    seconds = run_time(option.run, option.loads, machine, one_process)
    return Option(option.label, option.composition, option.run, option.share, times, seconds)


def _runs(traffic: Traffic, steps: int) -> Iterator[tuple[str, RunTraffic]]:
    """Strategies between patches, or what xDiT does without them."""
    shape = traffic.degrees
    if shape.patches == 1:
        yield CFG if shape.ulysses == 1 else ULYSSES, _run(traffic, "sync", steps)
        return
    for label, (name, given) in settings_by_label().items():
        strategy = get_strategy(name)
        if strategy.requires_cfg_parallel:
            continue  # on whatever number of patches
        config = strategy.make_config(given)
        if not isinstance(config, OtilConfig):
            continue  # a strategy of another package: nothing is known of what it sends
        if config.select.startswith("latent") and (shape.ulysses > 1 or not traffic.shows_latent):
            continue  # a run refuses it: there is no latent whose sub-blocks could be told apart
        yield label, traffic.of_run(config, steps)


def _run(traffic: Traffic, label: str, steps: int) -> RunTraffic:
    name, given = settings_by_label()[label]
    return traffic.of_run(get_strategy(name).make_config(given), steps)


def fastest_of_each(options: list[Option]) -> list[Option]:
    """The fastest option of each strategy, or where nothing is timed the one with fewest keys and values to send."""

    def cost(option: Option) -> tuple[float, float]:
        sent = sum(option.run.sent_bytes.get("kv", {}).values())
        return (math.inf if option.seconds is None else option.seconds, sent)

    labels = dict.fromkeys(option.label for option in options)
    return [min((option for option in options if option.label == label), key=cost) for label in labels]
