"""What `otil-xdit bench` measured, beside what the planner counts for the same runs."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from otil_xdit.dryrun.job import Job, ParallelDegrees
from otil_xdit.dryrun.networks import Network, find_network
from otil_xdit.dryrun.traffic import Traffic
from otil_xdit.method.config import OtilConfig
from otil_xdit.runtime.strategies import get_strategy
from otil_xdit.tools.common.links import Link
from otil_xdit.tools.plan.latency import Machine, share_of
from otil_xdit.tools.plan.options import Option

LOOPBACK = Link("loopback", math.inf, 0.0)
"""Where nothing was shaped: whatever messages cost there is the host's work."""

IN_FLIGHT = 1448 / 1514
"""Share of a shaped rate that messages reach of which several are under way at once, so that the cable never waits:
TCP's payload in a full Ethernet frame, as `tc` counts it."""

SWAPPING = 2.0
"""gloo's all-to-all posts its sends before its receives. So the rank that comes later sends first and lets the other
one send afterwards: one direction at a time. Measured, 64 kB to 4 MB: half of the rate, unless both come at once."""

_ALONE = "one process"

_CELL = ("model", "width", "size", "batch", "guidance", "dtype", "sampler", "steps")
"""What runs must have in common with one process's run for its time to be theirs."""


@dataclass(frozen=True)
class Observation:
    """One run of a bench.

    Attributes:
        name: what was run, with its median time: tells it from every other.
        group: what was run but for the strategy.
        option: what the planner counts for it, under the bench's label.
        link: what joined the ranks.
        cores: that they shared, or None.
        one_process: seconds of one process's step.
        step: measured seconds of a step, mean over an image, median of the rounds.
        by_mode: the same of the steps of each mode alone.
        counts_agree: whether bytes and messages are those that the run reported; None where it reported none.
    """

    name: str
    group: str
    option: Option
    link: Link
    cores: int | None
    one_process: float
    step: float
    by_mode: Mapping[str, float]
    counts_agree: bool | None

    def predicted(self, machine: Machine) -> float:
        """Return the seconds of a step under the model, mean over an image; link and cores are those of the run."""
        option = self.option.timed(self.placed(machine), self.one_process)
        return sum(option.times[mode].total for mode in option.run.modes) / len(option.run.modes)

    def placed(self, machine: Machine) -> Machine:
        """Return the machine's terms with the link and cores of the run."""
        return replace(machine, link=self.link, cores=self.cores)


def read_bench(path: str) -> tuple[list[Observation], list[str]]:
    """Read a bench's JSON.

    Returns:
        The runs on several ranks, and a line for each that says nothing to the planner.

    Raises:
        ValueError: for a file that is none.
    """
    try:
        bench = json.loads(Path(path).read_text())
        runs = bench["runs"]
        alone = {_cell(run): _step(run) for run in runs if run["strategy"] == _ALONE and run["seconds"]}
        link, cores = _link_of(bench["link"], max(run["ranks"] for run in runs)), bench["machine"]["cores"]
        found: list[Observation] = []
        left: list[str] = []
        for run in (run for run in runs if run["strategy"] != _ALONE):
            reason = _obstacle(run, alone)
            if reason is None:
                found.append(_observed(run, link, cores, alone[_cell(run)]))
            else:
                left.append(f"{_group(run, link)}, {run['strategy']}: {reason}")
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not what otil-xdit bench writes ({said}); give its JSON file") from error
    return found, left


def _obstacle(run: dict[str, Any], alone: Mapping[tuple[Any, ...], float]) -> str | None:
    degrees = run["degrees"]
    if run["skipped"] or not run["seconds"]:
        return f"not measured ({run['skipped']})"
    if degrees["ring"] > 1 or degrees["pipefusion"] > 1:
        return "not in the model"
    return None if _cell(run) in alone else "one process's time of the same is not there"


def _observed(run: dict[str, Any], link: Link, cores: int | None, one_process: float) -> Observation:
    network = _network(run["model"], run["width"])
    passes = network.batch if run["guidance"] > 1 else 1
    dtype = getattr(torch, run["dtype"])
    job = Job(network, run["size"], run["size"], run["batch"] * passes, dtype, network.text, passes > 1)
    degrees = ParallelDegrees(*(run["degrees"][name] for name in ("cfg", "ulysses", "patch")))
    settings, report = run["settings"], run["report"]
    config = get_strategy("sync").make_config({}) if settings is None else OtilConfig(**settings)
    window = None if report is None else report.get("window")
    # The busiest rank's for the time; rank 0's, which the bench reports, for the comparison.
    busiest = _traffic(job, degrees, None).of_run(config, run["steps"], window)
    agree = None
    if report is not None:
        first = _traffic(job, degrees, 0).of_run(config, run["steps"], window)
        agree = all(report[name] == getattr(first, name) for name in ("sent_bytes", "messages"))
    option = Option(run["strategy"], degrees, busiest, share_of(job, degrees))
    group, step = _group(run, link), _step(run)
    name = f"{group}, {option.label}, {step * 1e3:.3f} ms"
    return Observation(name, group, option, link, cores, one_process, step, _by_mode(run, busiest.modes), agree)


def _by_mode(run: dict[str, Any], modes: tuple[str, ...]) -> dict[str, float]:
    """Return the median over rounds of the mean over the steps of a mode; a generation's first step is nobody's."""
    rounds: defaultdict[str, list[float]] = defaultdict(list)
    for steps in run["step_seconds"]:
        for mode in dict.fromkeys(modes):
            seconds = [second for place, second in enumerate(steps) if place and modes[place] == mode]
            if seconds:
                rounds[mode].append(sum(seconds) / len(seconds))
    return {mode: median(seconds) for mode, seconds in rounds.items()}


def _step(run: dict[str, Any]) -> float:
    return float(median(run["seconds"])) / int(run["steps"])


def _cell(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[name] for name in _CELL)


def _group(run: dict[str, Any], link: Link) -> str:
    wide = f", {run['width']} times as wide" if run["width"] > 1 else ""
    return f"{Path(run['model']).name}{wide}, {run['size']} px, {run['ranks']} ranks, {link.name}"


def _link_of(link: dict[str, Any] | None, ranks: int) -> Link:
    """Return a bench's link as the model has it.

    The bench gathers on as many ranks as its largest run has, and its samples' bytes are those of one rank's
    payload, of which every rank receives ranks - 1.

    Small messages are the noisiest samples; none may take longer than a larger one.
    """
    if link is None:
        return LOOPBACK
    rate, samples = IN_FLIGHT * float(link["rate_bytes"]), list[tuple[float, float]]()
    for size, seconds in sorted(link["samples"], reverse=True):
        least = min(seconds, samples[-1][1]) if samples else seconds
        samples.append((float(size) * max(1, ranks - 1), float(least)))
    samples.reverse()
    return Link(f"{float(link['rate_bytes']) / 1e6:.1f} MB/s", rate, samples[0][1], tuple(samples), SWAPPING)


@lru_cache(maxsize=64)
def _traffic(job: Job, degrees: ParallelDegrees, place: int | None) -> Traffic:
    return Traffic(job, degrees, place)


@lru_cache(maxsize=16)
def _network(name: str, times: int) -> Network:
    return find_network(name, times)
