"""What a machine's terms are, fitted to runs of `otil-xdit bench`; and the model against other runs.

The time of a step (`otil_xdit.tools.plan.latency`) is linear in `TERMS` but for what travels late, which does not
depend
on them: for a step that ends with its messages, they are what counts. So the terms are found by least squares of
relative errors, none below 0, and it is repeated until the same steps are late; of several such ends the one that is
nearest to all steps, late ones too, is taken.
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
from otil_xdit.tools.plan.latency import Load, Machine, StepTime, step_time
from otil_xdit.tools.plan.observations import LOOPBACK, Observation

TERMS = ("slowdown", "per_ask", "per_message", "per_byte", "per_layer", "per_number", "contention")

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
        """Share of what was measured by which the prediction is off."""
        return self.predicted / self.observation.step - 1


@dataclass(frozen=True)
class Point:
    """The steps of one kind of a run.

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
        """Of a second's error."""
        return self.steps**0.5 / self.measured


def fit(observations: Sequence[Observation]) -> Machine:
    """The terms of the machine that made them; its link is that of the first, its cores as well.

    Raises:
        ValueError: where there is nothing to fit them to.
    """
    points = [
        Point(observation, load, observation.by_mode[mode], observation.run.modes.count(mode))
        for observation in observations
        for mode, load in observation.loads.items()
        if mode in observation.by_mode
    ]
    if len(points) < len(TERMS):
        raise ValueError(f"--fit: {len(points)} kinds of steps were measured; {len(TERMS)} terms want as many at least")
    found: list[tuple[float, Machine]] = []
    for start in _starts(points):
        machine = _settled(points, start)
        if machine is not None:
            found.append((sum(_miss(point, machine) for point in points), machine))
    if not found:
        raise ValueError("--fit: in nearly all steps the link is what counts; add runs over a faster one")
    return min(found, key=lambda pair: pair[0])[1]


def _starts(points: Sequence[Point]) -> Iterator[list[bool]]:
    """Which steps are late, to begin with: the n that have most to send beside their measured time, for every n.

    What is called late says nothing of the terms, and terms that make too little of work call it late again. So one
    start may end where another one fits better.
    """
    travelling = [point.load.on(point.observation.link)[1] / point.measured for point in points]
    order = sorted(range(len(points)), key=lambda place: -travelling[place])
    for count in range(sum(share > 0 for share in travelling) + 1):
        yield [place in order[:count] for place in range(len(points))]


def _settled(points: Sequence[Point], late: list[bool]) -> Machine | None:
    """The terms after repeating the fit until the same steps are late; None where too few are not."""
    first = points[0].observation
    machine = None
    for _ in range(_ROUNDS):
        rows, targets = [], []
        for point, is_late in zip(points, late, strict=True):
            if not is_late:
                rows.append([point.weight * value for value in _features(point.observation, point.load)])
                waiting = point.load.on(point.observation.link)[0]
                targets.append(point.weight * (point.measured - waiting))
        if len(rows) < len(TERMS):
            return None
        terms = least_squares(torch.tensor(rows, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64))
        machine = Machine(first.link, *terms, cores=first.cores)
        before, late = late, [_time(point, machine).late > 0 for point in points]
        if late == before:
            break
    return machine


def _time(point: Point, machine: Machine) -> StepTime:
    return step_time(point.load, point.observation.placed(machine), point.observation.one_process)


def _miss(point: Point, machine: Machine) -> float:
    """Squared, and weighted as in the fit."""
    return (point.weight * (_time(point, machine).total - point.measured)) ** 2


def least_squares(rows: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """The x, none below 0, for which |rows x - targets| is least; float64 [M, P] and [M], P small.

    By trying every set of terms that are not 0.
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


def _features(observation: Observation, load: Load) -> list[float]:
    """What the terms are multiplied by, in the order of `TERMS`."""
    crowding = Machine(observation.link, cores=observation.cores).crowding(load.ranks)
    counts = load.counts(observation.link)
    return [crowding * value for value in (observation.one_process * load.share, *counts)]


def compare(observations: Sequence[Observation], machine: Machine, fitted: Sequence[str]) -> list[Comparison]:
    """What the model says of each run; `fitted` are the names of those that the machine's terms were found with."""
    return [
        Comparison(observation, observation.predicted(machine), observation.name in fitted)
        for observation in observations
    ]


def orders(comparisons: Sequence[Comparison]) -> dict[str, tuple[int, int]]:
    """For each group of runs the pairs of strategies that the model orders as they were measured, and all pairs."""
    groups: defaultdict[str, list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        groups[comparison.observation.group].append(comparison)
    found = {}
    for group, runs in groups.items():
        pairs = [
            (one, other)
            for one, other in combinations(runs, 2)
            if abs(one.observation.step - other.observation.step)
            > _TIE * max(one.observation.step, other.observation.step)
        ]
        ordered = (
            ((one, other) if one.observation.step < other.observation.step else (other, one)) for one, other in pairs
        )
        alike = sum(faster.predicted < slower.predicted for faster, slower in ordered)
        found[group] = (alike, len(pairs))
    return found


def write_machine(machine: Machine, fitted: Sequence[str], path: str) -> None:
    """Keep a machine for ``--machine``."""
    terms = {term: getattr(machine, term) for term in TERMS}
    link = None if machine.link == LOOPBACK else asdict(machine.link)
    data = {**terms, "cores": machine.cores, "link": link, "fitted_on": list(fitted)}
    Path(path).write_text(json.dumps(data, indent=1) + "\n")


def read_machine(path: str) -> tuple[Machine, list[str]]:
    """A machine, and the names of the runs that its terms were fitted to; its link is `LOOPBACK` where it has none.

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
