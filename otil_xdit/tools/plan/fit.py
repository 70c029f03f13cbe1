"""What a machine's terms are, fitted to runs of `otil-xdit bench`; and the model against other runs.

The time of a step (`otil_xdit.tools.plan.latency`) is linear in `TERMS` but for what travels late, which does not
depend on them: for a step that ends with its messages, they are what counts. So the terms are found by least squares
of relative errors, none below 0, and it is repeated until the same steps are late; of several such ends the one that
is nearest to all steps, late ones too, is taken.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from otil_xdit.tools.common.links import Link
from otil_xdit.tools.plan.latency import TERMS, Load, Machine, StepTime, step_time
from otil_xdit.tools.plan.observations import LOOPBACK, Observation

_ROUNDS = 50
_TIE = 0.02
"""Measured times that differ by less, of the larger, have no order."""

WITHIN = 0.2
"""A prediction is counted as good when it is off by at most this share of what was measured."""


@dataclass(frozen=True)
class Comparison:
    """A run that was predicted.

    Attributes:
        observation: what was measured.
        predicted: seconds of a step.
        fitted: whether the machine's terms were found with this run.
    """

    observation: Observation
    predicted: float
    fitted: bool

    @property
    def error(self) -> float:
        """Return the share of what was measured by which the prediction is off."""
        return self.predicted / self.observation.step - 1


@dataclass(frozen=True)
class Point:
    """The steps of one mode of a run.

    Attributes:
        observation: the run.
        load: what the model reads of such a step.
        measured: seconds.
        steps: how many there are of it.
    """

    observation: Observation
    load: Load
    measured: float
    steps: int

    @property
    def weight(self) -> float:
        """Return the weight of a second's error."""
        return self.steps**0.5 / self.measured

    def time(self, machine: Machine) -> StepTime:
        """Predict the step on a machine's terms."""
        return step_time(self.load, self.observation.placed(machine), self.observation.one_process)

    def miss(self, machine: Machine) -> float:
        """Return the squared error, weighted as in the fit."""
        return (self.weight * (self.time(machine).total - self.measured)) ** 2

    def equation(self) -> list[float]:
        """Return what the terms are multiplied by, and what that shall come to, weighted."""
        seen = self.observation
        features = self.load.features(Machine(seen.link, cores=seen.cores), seen.one_process)
        work = self.measured - self.load.waiting(seen.link)
        return [self.weight * value for value in (*features, work)]


def fit(observations: Sequence[Observation]) -> Machine:
    """Find the terms of the machine that made some runs; its link is that of the first, its cores as well.

    Raises:
        ValueError: where there is nothing to fit them to.
    """
    points = [
        Point(observation, load, observation.by_mode[mode], observation.option.run.modes.count(mode))
        for observation in observations
        for mode, load in observation.option.loads.items()
        if mode in observation.by_mode
    ]
    if len(points) < len(TERMS):
        raise ValueError(f"--fit: {len(points)} kinds of steps were measured; {len(TERMS)} terms want as many at least")
    found = [machine for late in _starts(points) if (machine := _settled(points, late)) is not None]
    if not found:
        raise ValueError("--fit: in nearly all steps the link is what counts; add runs over a faster one")
    return min(found, key=lambda machine: sum(point.miss(machine) for point in points))


def _starts(points: Sequence[Point]) -> Iterator[list[bool]]:
    """Yield which steps are late, to begin with: the n with most to send beside their measured time, for every n.

    What is called late says nothing of the terms, and terms that make too little of work call it late again. So one
    start may end where another one fits better.
    """
    travelling = [point.load.travelling(point.observation.link) / point.measured for point in points]
    order = sorted(range(len(points)), key=lambda place: -travelling[place])
    for count in range(sum(share > 0 for share in travelling) + 1):
        yield [place in order[:count] for place in range(len(points))]


def _settled(points: Sequence[Point], late: list[bool]) -> Machine | None:
    """Repeat the fit until the same steps are late; None where too few are not."""
    first = points[0].observation
    machine = None
    for _ in range(_ROUNDS):
        equations = [point.equation() for point, is_late in zip(points, late, strict=True) if not is_late]
        if len(equations) < len(TERMS):
            return None
        table = torch.tensor(equations, dtype=torch.float64)
        machine = Machine(first.link, *least_squares(table[:, :-1], table[:, -1]), cores=first.cores)
        before, late = late, [point.time(machine).late > 0 for point in points]
        if late == before:
            break
    return machine


def least_squares(rows: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """Return the x, none below 0, for which |rows x - targets| is least, by trying every set of terms that are not 0.

    Args:
        rows: float64 [M, P], P small.
        targets: float64 [M].
    """
    count = rows.shape[1]
    scale = rows.norm(dim=0).clamp_min(1e-300)
    best, least = [0.0] * count, float(targets.square().sum())
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            part = rows[:, list(chosen)] / scale[list(chosen)]
            found = torch.linalg.lstsq(part, targets[:, None], driver="gelsd").solution[:, 0]
            rest = float((part @ found - targets).square().sum())
            if bool((found >= 0).all()) and rest < least * (1 - 1e-12):
                best, least = [0.0] * count, rest
                for place, value in zip(chosen, found / scale[list(chosen)], strict=True):
                    best[place] = float(value)
    return best


def compare(observations: Sequence[Observation], machine: Machine, fitted: Sequence[str]) -> list[Comparison]:
    """Predict each run; `fitted` are the names of those that the machine's terms were found with."""
    return [Comparison(one, one.predicted(machine), one.name in fitted) for one in observations]


def orders(comparisons: Sequence[Comparison]) -> dict[str, tuple[int, int]]:
    """Return for each group of runs the pairs of strategies that the model orders as measured, and all pairs."""
    groups: defaultdict[str, list[Comparison]] = defaultdict(list)
    for comparison in sorted(comparisons, key=lambda one: one.observation.step):
        groups[comparison.observation.group].append(comparison)
    found = {}
    for group in dict.fromkeys(comparison.observation.group for comparison in comparisons):
        pairs = [
            (faster, slower)
            for faster, slower in combinations(groups[group], 2)
            if slower.observation.step - faster.observation.step > _TIE * slower.observation.step
        ]
        found[group] = (sum(faster.predicted < slower.predicted for faster, slower in pairs), len(pairs))
    return found


def write_machine(machine: Machine, fitted: Sequence[str], path: str) -> None:
    """Write a machine for ``--machine``."""
    terms = dict(zip(TERMS, machine.terms, strict=True))
    link = None if machine.link == LOOPBACK else asdict(machine.link)
    data = {**terms, "cores": machine.cores, "link": link, "fitted_on": list(fitted)}
    Path(path).write_text(json.dumps(data, indent=1) + "\n")


def read_machine(path: str) -> tuple[Machine, list[str]]:
    """Read a machine; its link is `LOOPBACK` where it has none.

    Returns:
        The machine, and the names of the runs that its terms were fitted to.

    Raises:
        ValueError: for a file that is none.
    """
    try:
        data: dict[str, Any] = json.loads(Path(path).read_text())
        link = LOOPBACK if data["link"] is None else _link(data["link"])
        machine = Machine(link, *(float(data[term]) for term in TERMS), cores=data["cores"])
        return machine, list(data["fitted_on"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"--machine {path} is not what --fit writes ({said})") from error


def _link(data: dict[str, Any]) -> Link:
    return Link(**{**data, "samples": tuple((float(size), float(seconds)) for size, seconds in data["samples"])})
