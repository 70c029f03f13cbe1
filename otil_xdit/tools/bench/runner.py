"""Lets the strategies take turns: all of a cell are loaded, one makes an image while the others are stopped."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
from tqdm import tqdm

from otil_xdit.tools.bench.calibrate import ShapedLink, calibrate, calibrate_to
from otil_xdit.tools.bench.link import Namespaces
from otil_xdit.tools.bench.plan import Cell, Plan, Strategy, parse_strategy
from otil_xdit.tools.bench.results import Results, Run
from otil_xdit.tools.bench.tasks import ImageTask
from otil_xdit.tools.common.jobs import Job, JobFailed, Jobs, jobs_of_a_run
from otil_xdit.tools.common.links import LinkRequest
from otil_xdit.tools.common.progress import progress
from otil_xdit.xdit.launcher.processes import caught_signals

SPARE_BYTES = 1 << 30
"""Memory that is left free when strategies are loaded."""

ROOM = 1.2
"""How much more memory a strategy may need than the largest one so far."""

ORDER_SEED = 0

UNSHAPED = 10e9
"""Bytes per second: a rate that this machine's network stack does not reach."""

PROBE_ROUNDS = 3


def run_plan(plan: Plan, request: LinkRequest | None, logs: Path, results: Results, save: Callable[[], None]) -> None:
    """Run every cell; `results` grow, and `save` is called when a cell is done.

    Args:
        plan: what to run.
        request: the link between ranks, or None for what there is; `plan` has one number of ranks then.
        logs: folder for what the ranks write.

    Raises:
        JobFailed: when a rank of one of this package's strategies fails, or any rank after it has made an image.
        LinkError: when the link cannot be made.
        Interrupted: after a signal. In each case nothing is left behind.
    """
    with ExitStack() as stack:
        caught = stack.enter_context(caught_signals())
        cells = list(plan.cells)
        network = None if request is None else stack.enter_context(Namespaces(cells[0].ranks))
        jobs = stack.enter_context(jobs_of_a_run(logs, plan.limit, caught, network))
        if network is not None and request is not None:
            results.link = _make_slow(plan, cells[0], request, network, jobs)
        total = (plan.warmup_rounds + plan.rounds) * sum(len(plan.strategies_of(cell)) for cell in cells)
        bar = stack.enter_context(progress(total, "image"))
        for cell in cells:
            bar.set_description(str(cell))
            results.runs += CellRunner(plan, cell, jobs, bar).run()
            save()


def _task(plan: Plan, cell: Cell, strategy: Strategy) -> ImageTask:
    return ImageTask(
        strategy.text,
        cell.model.folder,
        cell.width,
        cell.size,
        plan.sampler_of(cell.model),
        plan.steps,
        plan.guidance,
    )


class CellRunner:
    """Makes the images of one cell's strategies, which take turns."""

    def __init__(self, plan: Plan, cell: Cell, jobs: Jobs, bar: tqdm) -> None:
        self._plan, self._cell, self._jobs, self._bar = plan, cell, jobs, bar
        self._used = 0

    def run(self) -> list[Run]:
        """Return the cell's runs, in the order of the strategies."""
        runs = [Run(self._cell, strategy) for strategy in self._plan.strategies_of(self._cell)]
        todo, alternation = runs, 0
        while todo:
            ready, todo = self._load(todo)
            for run, _ in ready:
                run.alternation = alternation
            self._alternate(ready)
            for _, job in ready:
                self._jobs.close(job)
            alternation += 1
        return runs

    def _load(self, runs: Sequence[Run]) -> tuple[list[tuple[Run, Job]], list[Run]]:
        """Load as many as memory allows, and make their warm-up images; return them, and those that are left."""
        ready: list[tuple[Run, Job]] = []
        for index, run in enumerate(runs):
            if ready and psutil.virtual_memory().available < ROOM * self._used + SPARE_BYTES:
                return ready, list(runs[index:])
            job = self._loaded(run)
            if job is not None:
                ready.append((run, job))
                self._used = max(self._used, job.memory())
        return ready, []

    def _loaded(self, run: Run) -> Job | None:
        """Start the job of a run; None where it is skipped: what is not this package's may be unable to run here."""
        plan, cell, strategy = self._plan, self._cell, run.strategy
        run.skipped = strategy.obstacle(cell.model, cell.ranks, plan.steps, plan.guidance)
        job = None
        if run.skipped is None:
            try:
                job = self._jobs.start(f"{cell}, {strategy.text}", _task(plan, cell, strategy), run.ranks)
                for _ in range(plan.warmup_rounds):
                    self._jobs.ask(job)
                    self._bar.update()
                return job
            except JobFailed as failure:
                if strategy.variant is not None:
                    raise
                run.skipped = failure.reason
                if job is not None:
                    self._jobs.close(job)
        self._bar.total -= plan.warmup_rounds + plan.rounds
        return None

    def _alternate(self, ready: Sequence[tuple[Run, Job]]) -> None:
        """Run all rounds; in each of them every strategy has a turn, in another order."""
        order = random.Random(ORDER_SEED)
        for _ in range(self._plan.rounds):
            for run, job in order.sample(ready, len(ready)):
                run.rounds.append(self._jobs.ask(job))
                self._bar.update()


def _make_slow(plan: Plan, cell: Cell, request: LinkRequest, namespaces: Namespaces, jobs: Jobs) -> ShapedLink:
    """Shape the link as requested, and measure it."""
    if request.rate is not None:
        return calibrate(jobs, namespaces, request.rate, request.text)
    assert request.ratio is not None
    namespaces.shape(UNSHAPED)
    kv_bytes, seconds = _computing(plan, cell, jobs)
    link = calibrate_to(jobs, namespaces, kv_bytes / (request.ratio * seconds), request.text)
    return replace(link, ratio=kv_bytes / seconds / link.beta_bytes_per_second)


def _computing(plan: Plan, cell: Cell, jobs: Jobs) -> tuple[float, float]:
    """Measure bytes of keys and values that a rank sends in a synchronous step, and seconds of a step without any."""
    run = Run(cell, parse_strategy("naive"))
    job = jobs.start("naive, for the ratio", _task(plan, cell, run.strategy), cell.ranks)
    rounds = [jobs.ask(job) for _ in range(plan.warmup_rounds + PROBE_ROUNDS)]
    run.rounds = rounds[plan.warmup_rounds :]
    jobs.close(job)
    found = run.computing()
    assert found is not None, "the tool has seen to enough steps"
    return found
