"""What `otil-xdit plan` compares: strategies on the degrees that the ranks allow, with bytes, memory and time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from otil_xdit.dryrun.job import Job, ParallelDegrees
from otil_xdit.dryrun.traffic import RunTraffic, Traffic
from otil_xdit.method.config import OtilConfig
from otil_xdit.runtime.card_agreement import must_be_alike
from otil_xdit.runtime.strategies import get_strategy, strategies
from otil_xdit.tools.plan.latency import Load, Machine, StepTime, share_of, step_time
from otil_xdit.xdit.flags.options import AUTO, Shares
from otil_xdit.xdit.plugin.measured_shares import patch_of, shares_of

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
        degrees: of the ranks.
        run: what is sent and kept.
        share: of one process's computing that the busiest rank does.
        times: predicted, of a step of each mode; empty where nothing is known of one process's step.
        seconds: of all steps, or None.
    """

    label: str
    degrees: ParallelDegrees
    run: RunTraffic
    share: float
    times: dict[str, StepTime] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def is_exact(self) -> bool:
        """Tell whether the images are one process's."""
        return self.label in ("sync", ULYSSES, CFG)

    @cached_property
    def loads(self) -> dict[str, Load]:
        """Return what the model of time reads of a step of each mode."""
        return {mode: Load.of(step, self.degrees.ranks, self.share) for mode, step in self.run.steps.items()}

    def timed(self, machine: Machine, one_process: float) -> Option:
        """Return the option with predictions.

        Args:
            machine: with the link that joins the ranks.
            one_process: seconds of one process's step.
        """
        times = {mode: step_time(load, machine, one_process) for mode, load in self.loads.items()}
        return replace(self, times=times, seconds=sum(times[mode].total for mode in self.run.modes))

    @property
    def flags(self) -> list[str]:
        """Return the flags of `xfuser` besides model, size and steps."""
        degrees = self.degrees
        name, given = settings_by_label().get(self.label, (None, {}))
        implied = name is not None and get_strategy(name).requires_cfg_parallel
        found = ["--use_cfg_parallel"] if degrees.cfg > 1 and not implied else []
        found += ["--ulysses_degree", str(degrees.ulysses)] if degrees.ulysses > 1 else []
        if name is not None:
            others = [part for setting, value in given.items() for part in (f"--otil_{setting}", value)]
            found += ["--parallel", name, *others]
            found += ["--patch_degree", str(degrees.patches)] if degrees.patches > 1 else []
            found += ["--patch_shares", ",".join(map(str, degrees.shares))] if degrees.shares else []
        return found


def degrees_of(
    gpus: int, job: Job, cfg: int | None, ulysses: int | None, shares: Shares = (), rates: Sequence[float] = ()
) -> list[ParallelDegrees]:
    """Return every way to share `gpus` ranks out, as far as the degrees are not given.

    Args:
        gpus: number of ranks.
        job: the step.
        cfg, ulysses: the degrees that are given.
        shares: of the patches, of which there are as many then; empty for any number of equal ones, ``auto`` for what
            a run would find on cards of these rates.
        rates: operations a second of each rank's card; empty where the cards are alike, or as the shares.

    Raises:
        ValueError: for degrees that do not divide them, or guidance that one pass does.
    """
    if cfg == 2 and job.network.batch == 1:
        raise ValueError(f"--cfg_degree 2: {job.network.name} has no second pass without the prompt; give 1")
    halves = [cfg] if cfg else [1] if job.network.batch == 1 or job.batch % 2 else [1, 2]
    given_shares = () if isinstance(shares, str) else shares
    found = [
        _with_cards(ParallelDegrees(half, heads, gpus // (half * heads), given_shares), shares == AUTO, rates)
        for half in halves
        for heads in ([ulysses] if ulysses else range(1, gpus + 1))
        if gpus % (half * heads) == 0 and (not given_shares or gpus == half * heads * len(given_shares))
    ]
    if not found:
        given = " ".join(f"--{name}_degree {value}" for name, value in (("cfg", cfg), ("ulysses", ulysses)) if value)
        accepted = "degrees whose product divides it"
        if given_shares:
            given += f" --patch_shares {','.join(map(str, given_shares))}"
            accepted = "a share for each patch: --gpus divided by the cfg and Ulysses degrees"
        raise ValueError(f"--gpus {gpus} cannot be shared out with {given.strip()}; give {accepted}")
    return found


def _with_cards(degrees: ParallelDegrees, is_auto: bool, rates: Sequence[float]) -> ParallelDegrees:
    """Return degrees with the speeds of the patches, each that of its slowest rank, and the shares that follow."""
    if not rates:
        return degrees
    numbers = range(degrees.ranks)
    speeds = tuple(
        min(rates[number] for number in numbers if patch_of(number, degrees.rows, degrees.ulysses) == patch)
        / max(rates)
        for patch in range(degrees.patches)
    )
    shares = shares_of([1 / speed for speed in speeds]) if is_auto else degrees.shares
    return replace(degrees, shares=shares, speeds=speeds)


def options_of(
    job: Job,
    candidates: list[ParallelDegrees],
    steps: int,
    counts_launches: bool = False,
    cards_differ: bool = False,
) -> tuple[list[Option], dict[ParallelDegrees, str]]:
    """Find every strategy on all degrees that fit.

    Args:
        job: the step.
        candidates: degrees to try.
        steps: number of steps.
        counts_launches: whether kernels are counted as well, and the bytes that they move.
        cards_differ: whether their compute capabilities do, which a run refuses under some strategies.

    Returns:
        The options, and why other degrees are left out.

    Raises:
        ValueError: where none fits.
    """
    found: list[Option] = []
    refused: dict[ParallelDegrees, str] = {}
    for degrees in candidates:
        try:
            traffic = Traffic(job, degrees, counts_launches=counts_launches)
        except ValueError as error:
            refused[degrees] = str(error)
            continue
        share = share_of(job, degrees)
        found += [Option(label, degrees, run, share) for label, run in _runs(traffic, steps, cards_differ)]
        if degrees.cfg == 2 and job.is_guided:
            try:
                found.append(Option(HYBRIDIFF, degrees, _run(traffic, HYBRIDIFF, steps), share))
            except ValueError as error:
                refused[degrees] = f"{HYBRIDIFF}: {error}"
    if not found:
        raise ValueError("; ".join(dict.fromkeys(refused.values())))
    return found, refused


def _runs(traffic: Traffic, steps: int, cards_differ: bool) -> Iterator[tuple[str, RunTraffic]]:
    """Yield strategies between patches, or what xDiT does without them."""
    degrees = traffic.degrees
    if degrees.patches == 1:
        yield CFG if degrees.ulysses == 1 else ULYSSES, _run(traffic, "sync", steps)
        return
    for label, (name, given) in settings_by_label().items():
        strategy = get_strategy(name)
        if strategy.requires_cfg_parallel:
            continue  # on whatever number of patches
        config = strategy.make_config(given)
        if not isinstance(config, OtilConfig):
            continue  # a strategy of another package: nothing is known of what it sends
        if cards_differ and must_be_alike(config):
            continue
        if config.select.startswith("latent") and (degrees.ulysses > 1 or not traffic.shows_latent):
            continue  # a run refuses it: there is no latent whose sub-blocks could be told apart
        yield label, traffic.of_run(config, steps)


def _run(traffic: Traffic, label: str, steps: int) -> RunTraffic:
    name, given = settings_by_label()[label]
    return traffic.of_run(get_strategy(name).make_config(given), steps)


def fastest_of_each(options: list[Option]) -> list[Option]:
    """Return the fastest option of each strategy; where nothing is timed, the one that sends fewest keys and values."""

    def cost(option: Option) -> tuple[float, float]:
        sent = sum(option.run.sent_bytes.get("kv", {}).values())
        return (math.inf if option.seconds is None else option.seconds, sent)

    labels = dict.fromkeys(option.label for option in options)
    return [min((option for option in options if option.label == label), key=cost) for label in labels]
