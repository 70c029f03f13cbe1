"""What a bench finds, as it is written to JSON, and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from otil_xdit.dryrun.traffic import LAST_STAGED, STAGED, modes_of
from otil_xdit.method.config import OtilConfig
from otil_xdit.tools.bench.calibrate import Link
from otil_xdit.tools.bench.plan import Cell, Plan, Strategy
from otil_xdit.tools.common.environment import machine, versions
from otil_xdit.tools.common.worker import Answer

_LATE = ("displaced", STAGED, LAST_STAGED)
"""Modes of the steps that use what was sent at the step before."""

BYTE_KINDS = ("kv", "small", "output")
"""As a report has them, with ``_bytes_per_step`` behind."""


@dataclass(frozen=True)
class Spread:
    """Of several rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass
class Run:
    """One strategy in one cell: a row. Lists have an entry for each round that counts.

    Attributes:
        cell, strategy: what it is.
        alternation: a number that the runs share which took turns with each other.
        seconds: of the denoising loop of one image, on the slowest rank.
        step_seconds: of each of its steps, on the slowest rank of the step.
        cpu_step_seconds: what the main thread of the busiest rank computed in each step; None where a GPU computes.
        waited_seconds: for others' messages, in the image, mean of the ranks; None where nobody counts it.
        worked_seconds: of the exchange's own work on the host, waiting left out; likewise.
        report: of rank 0's last image, None where nobody counts.
        rank_bytes: by rank, what it handed to collectives in a step of its last image, mean over the steps after
            warm-up, by ``kv``, ``small`` (halo rows, moments) and ``output``; likewise.
        skipped: why there are no figures, or None.
    """

    cell: Cell
    strategy: Strategy
    alternation: int = 0
    seconds: list[float] = field(default_factory=list)
    step_seconds: list[list[float]] = field(default_factory=list)
    cpu_step_seconds: list[list[float]] | None = None
    waited_seconds: list[float] | None = None
    worked_seconds: list[float] | None = None
    report: dict[str, Any] | None = None
    rank_bytes: list[dict[str, float]] | None = None
    skipped: str | None = None

    @property
    def ranks(self) -> int:
        return self.strategy.ranks(self.cell.ranks)

    def add(self, answers: Sequence[Answer]) -> None:
        """A round's answers, by rank."""
        steps = [answer["step_seconds"] for answer in answers]
        self.seconds.append(max(map(sum, steps)))
        self.step_seconds.append(_slowest(steps))
        cpu = [answer["cpu_step_seconds"] for answer in answers]
        if cpu[0] is not None:
            self.cpu_step_seconds = [*(self.cpu_step_seconds or []), _slowest(cpu)]
        self.report = answers[0]["report"]
        if self.report is not None:
            self.rank_bytes = [
                {kind: answer["report"][f"{kind}_bytes_per_step"] for kind in BYTE_KINDS} for answer in answers
            ]
            waited = fmean(answer["report"]["waited_seconds"] for answer in answers)
            spent = fmean(answer["report"]["exchange_seconds"] for answer in answers)
            self.waited_seconds = [*(self.waited_seconds or []), waited]
            self.worked_seconds = [*(self.worked_seconds or []), spent - waited]

    def image(self) -> Spread:
        """Seconds per step over all steps of an image."""
        return Spread.of([seconds / len(steps) for seconds, steps in zip(self.seconds, self.step_seconds, strict=True)])

    def after_warmup(self) -> Spread | None:
        """Seconds per step over the steps after the strategy's warm-up; None without one, or where no step is left."""
        return self._over(self.step_seconds, self._after()) if self._has_warmup else None

    def steady(self) -> Spread | None:
        """Seconds per step over the steps after the strategy's warm-up if it has any, else over all; None where no step
        is left."""
        return self._over(self.step_seconds, self._after())

    def steady_cpu(self) -> Spread | None:
        """CPU seconds of the busiest rank's main thread in a step, over the same steps; None where a GPU computes."""
        return None if self.cpu_step_seconds is None else self._over(self.cpu_step_seconds, self._after())

    def displaced(self) -> Spread | None:
        """Seconds per step over the steps that use payloads of the step before; None where there are none."""
        config = self._config
        if config is None:
            return None
        found = (self.report or {}).get("window")
        modes = modes_of(config.replace(tolerance=0.0), self.steps, self.cell.model.is_unet, found)
        return self._over(self.step_seconds, [step for step, mode in enumerate(modes) if mode in _LATE])

    def computing(self) -> tuple[float, float] | None:
        """Of `naive`: bytes of keys and values that a rank sends in a synchronous step, and seconds of a step without
        any; None where there are no such steps."""
        after, report = self.after_warmup(), self.report
        if after is None or not report or not report["warmup_steps"]:
            return None
        return report["sent_bytes"]["kv"]["warmup"] / report["warmup_steps"], after.median

    @property
    def steps(self) -> int:
        return len(self.step_seconds[0])

    @property
    def _config(self) -> OtilConfig | None:
        config = None if self.strategy.variant is None else self.strategy.variant.config
        return config if isinstance(config, OtilConfig) else None

    @property
    def _has_warmup(self) -> bool:
        config = self._config
        return config is not None and config.freshness != "sync"

    def _after(self) -> range:
        config = self._config
        return range(config.warmup_steps if config is not None and self._has_warmup else 0, self.steps)

    @staticmethod
    def _over(rounds: Sequence[Sequence[float]], steps: Sequence[int]) -> Spread | None:
        return Spread.of([fmean(seconds[step] for step in steps) for seconds in rounds]) if steps else None


def _slowest(ranks: Sequence[Sequence[float]]) -> list[float]:
    """Of each step, by the rank that took longest."""
    return [max(step) for step in zip(*ranks, strict=True)]


@dataclass
class Results:
    """Everything that a bench found, as far as it is."""

    plan: Plan
    command: str
    link: Link | None = None
    runs: list[Run] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {
            "versions": {name.replace("-", "_"): number for name, number in versions().items()},
            "command": self.command,
            "machine": machine(),
            "link": None if self.link is None else self.link.to_dict(),
            "runs": [_as_dict(run, self.plan) for run in self.runs],
        }


def _as_dict(run: Run, plan: Plan) -> dict[str, Any]:
    cell = run.cell
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
        "strategy": run.strategy.label,
        "settings": run.strategy.settings,
        "ranks": run.ranks,
        "degrees": run.strategy.degrees(cell.ranks),
        "seconds": run.seconds,
        "step_seconds": run.step_seconds,
        "cpu_step_seconds": run.cpu_step_seconds,
        "waited_seconds": run.waited_seconds,
        "worked_seconds": run.worked_seconds,
        "report": run.report,
        "rank_bytes": run.rank_bytes,
        "skipped": run.skipped,
        "alternation": run.alternation,
    }
