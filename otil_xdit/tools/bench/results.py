"""What a bench finds, as it is written to JSON, and its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from otil_xdit.dryrun.step_modes import LAST_STAGED, STAGED, modes_of
from otil_xdit.method.config import OtilConfig
from otil_xdit.tools.bench.calibrate import ShapedLink
from otil_xdit.tools.bench.plan import Cell, Plan, Strategy
from otil_xdit.tools.common.environment import machine, versions
from otil_xdit.tools.common.worker import Answer

_LATE = ("displaced", STAGED, LAST_STAGED)
"""Modes of the steps that use what was sent at the step before."""

BYTE_KINDS = ("kv", "small", "output")
"""Keys and values; halo rows and moments; the output. As a report has them, with ``_bytes_per_step`` behind."""

_FIGURES = (
    "seconds",
    "step_seconds",
    "cpu_step_seconds",
    "waited_seconds",
    "worked_seconds",
    "report",
    "rank_bytes",
    "skipped",
    "alternation",
)
"""Attributes of a run that the JSON has as they are."""


@dataclass(frozen=True)
class Spread:
    """Median, least and most of several rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of some values."""
        return cls(median(values), min(values), max(values))

    def scaled(self, factor: float) -> Spread:
        """Return the spread of `factor` times the values."""
        return Spread(factor * self.median, factor * self.least, factor * self.most)


@dataclass
class Run:
    """One strategy in one cell: a row.

    Attributes:
        cell, strategy: what it is.
        alternation: a number that the runs share which took turns with each other.
        skipped: why there are no figures, or None.
        rounds: of each round that counts, the ranks' answers (`otil_xdit.tools.bench.tasks.ImageTask`).
    """

    cell: Cell
    strategy: Strategy
    alternation: int = 0
    skipped: str | None = None
    rounds: list[list[Answer]] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        """How many ranks it uses."""
        return self.strategy.ranks(self.cell.ranks)

    @property
    def steps(self) -> int:
        """Denoising steps of an image."""
        return len(self.step_seconds[0])

    @property
    def report(self) -> dict[str, Any] | None:
        """Report of rank 0's last image; None where nobody counts."""
        return self.rounds[-1][0]["report"] if self.rounds else None

    @property
    def seconds(self) -> list[float]:
        """Seconds of the denoising loop of each round's image, on the slowest rank."""
        return [max(sum(answer["step_seconds"]) for answer in answers) for answers in self.rounds]

    @property
    def step_seconds(self) -> list[list[float]]:
        """Seconds of each step of each round, on the slowest rank of the step."""
        return self._slowest("step_seconds")

    @property
    def cpu_step_seconds(self) -> list[list[float]] | None:
        """Seconds that the main thread of the busiest rank computed in each step; None where a GPU computes."""
        counted = self.rounds and self.rounds[0][0]["cpu_step_seconds"] is not None
        return self._slowest("cpu_step_seconds") if counted else None

    @property
    def waited_seconds(self) -> list[float] | None:
        """Seconds that each round's image waited for others' messages, mean of the ranks; None where nobody counts."""
        return self._means(_waited)

    @property
    def worked_seconds(self) -> list[float] | None:
        """Seconds of the exchange's own work, waiting left out; likewise."""
        return self._means(lambda report: _exchanged(report) - _waited(report))

    @property
    def rank_bytes(self) -> list[dict[str, float]] | None:
        """By rank, bytes that it handed to collectives in a step of its last image, by `BYTE_KINDS`.

        Means over the steps after warm-up; None where nobody counts.
        """
        if self.report is None:
            return None
        reports = [answer["report"] for answer in self.rounds[-1]]
        return [{kind: report[f"{kind}_bytes_per_step"] for kind in BYTE_KINDS} for report in reports]

    def _slowest(self, name: str) -> list[list[float]]:
        """Return of each step, in each round, the most that a rank took."""
        return [[max(step) for step in zip(*(one[name] for one in answers), strict=True)] for answers in self.rounds]

    def _means(self, figure: Callable[[dict[str, Any]], float]) -> list[float] | None:
        """Return a figure of the ranks' reports for each round, mean over the ranks."""
        if self.report is None:
            return None
        return [fmean(figure(answer["report"]) for answer in answers) for answers in self.rounds]

    def image(self) -> Spread:
        """Return seconds per step over all steps of an image."""
        return Spread.of(self.seconds).scaled(1 / self.steps)

    def after_warmup(self) -> Spread | None:
        """Return seconds per step after the strategy's warm-up; None without one, or where no step is left."""
        return None if self._warmup_steps is None else self.steady()

    def steady(self) -> Spread | None:
        """Return seconds per step after the strategy's warm-up if it has any, else over all; None for no step."""
        return _over(self.step_seconds, range(self._warmup_steps or 0, self.steps))

    def steady_cpu(self) -> Spread | None:
        """Return CPU seconds of the busiest rank's main thread over the same steps; None where a GPU computes."""
        return _over(self.cpu_step_seconds, range(self._warmup_steps or 0, self.steps))

    def displaced(self) -> Spread | None:
        """Return seconds per step over the steps that use payloads of the step before; None where there are none."""
        if self._config is None:
            return None
        found = (self.report or {}).get("window")
        modes = modes_of(self._config.replace(tolerance=0.0), self.steps, self.cell.model.is_unet, found)
        return _over(self.step_seconds, [step for step, mode in enumerate(modes) if mode in _LATE])

    def computing(self) -> tuple[float, float] | None:
        """Return, of `naive`, what a link's ratio is of; None where there are no such steps.

        Returns:
            Bytes of keys and values that a rank sends in a synchronous step, and seconds of a step without any.
        """
        after, report = self.after_warmup(), self.report
        if after is None or not report or not report["warmup_steps"]:
            return None
        return report["sent_bytes"]["kv"]["warmup"] / report["warmup_steps"], after.median

    @property
    def _config(self) -> OtilConfig | None:
        config = None if self.strategy.variant is None else self.strategy.variant.config
        return config if isinstance(config, OtilConfig) else None

    @property
    def _warmup_steps(self) -> int | None:
        """Synchronous steps before the others; None where no steps are of two kinds."""
        config = self._config
        return None if config is None or config.freshness == "sync" else config.warmup_steps

    def to_dict(self, plan: Plan) -> dict[str, Any]:
        """Return what the JSON file has of it."""
        cell = self.cell
        return {
            "model": cell.model.name,
            "width": cell.width,
            "size": cell.size,
            "latent": list(cell.latent),
            "batch": 1,
            "guidance": plan.guidance,
            "dtype": "float32",
            "sampler": plan.sampler_of(cell.model),
            "steps": plan.steps,
            "strategy": self.strategy.label,
            "settings": self.strategy.settings,
            "ranks": self.ranks,
            "degrees": self.strategy.degrees(cell.ranks),
            **{name: getattr(self, name) for name in _FIGURES},
        }


def _over(rounds: Sequence[Sequence[float]] | None, steps: Sequence[int]) -> Spread | None:
    """Return seconds per step over some of the steps; None for none, or where nobody counts."""
    return Spread.of([fmean(seconds[step] for step in steps) for seconds in rounds]) if rounds and steps else None


@dataclass
class Results:
    """Everything that a bench found, as far as it is."""

    plan: Plan
    command: str
    link: ShapedLink | None = None
    runs: list[Run] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return what the JSON file holds."""
        return {
            "versions": {name.replace("-", "_"): number for name, number in versions().items()},
            "command": self.command,
            "machine": machine(),
            "link": None if self.link is None else asdict(self.link),
            "runs": [run.to_dict(self.plan) for run in self.runs],
        }


def _waited(report: dict[str, Any]) -> float:
    """Return the seconds of waiting in an image: the host's, or those of the device's timed steps for all steps."""
    return _of_image(report, "device_waited_seconds", "waited_seconds")


def _exchanged(report: dict[str, Any]) -> float:
    """Return the seconds that the exchange took in an image, likewise."""
    return _of_image(report, "device_exchange_seconds", "exchange_seconds")


def _of_image(report: dict[str, Any], of_device: str, of_host: str) -> float:
    timed = report.get(of_device)
    return float(report[of_host] if timed is None else timed * report["steps"] / report["timed_steps"])
