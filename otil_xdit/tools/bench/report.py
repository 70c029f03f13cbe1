"""What a bench found as a Markdown table and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from otil_xdit.tools.bench.calibrate import ShapedLink
from otil_xdit.tools.bench.plan import ALONE
from otil_xdit.tools.bench.results import Results, Run, Spread
from otil_xdit.tools.common import tables
from otil_xdit.tools.common.environment import machine, versions
from otil_xdit.tools.common.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADER = """\
Median of {rounds} rounds (least, most); {warmup_rounds} before them not counted. In every round each strategy makes
one image of {steps} steps, in an order that changes; the others are loaded and stopped. Only the denoising loop is
timed, a step on its slowest rank. "ms per step": the whole loop, the strategy's own synchronous warm-up steps
included, over its steps; "times as fast": one process's over it; "after warm-up": without those warm-up steps;
"displaced steps": only those that use payloads of the step before. "Waited": for messages, whole loop, mean of the
ranks; "own work": in the exchange's calls besides (predict, pick, code, copy, send). "CPU": what the main thread of the
busiest rank computed, waiting left out, in the steps after warm-up, or in all where there is none: also where ranks
share cores. kB: 1000 bytes that rank 0 hands
to collectives in a step, mean over the steps after warm-up. Empty: there is no such step, or nobody counts. float32,
guidance {guidance:g} (two passes in a batch), one image.
"""


def table(results: Results) -> str:
    """Return the rows in Markdown, a table for each cell, under a header that says what was measured and how."""
    plan, where = results.plan, machine()
    known = ", ".join(f"{name} {number}" for name, number in versions().items())
    header = HEADER.format(
        rounds=plan.rounds, warmup_rounds=plan.warmup_rounds, steps=plan.steps, guidance=plan.guidance
    )
    lines = [f"    {results.command}", "", header.rstrip(), ""]
    lines += [f"{where['cpu']}, {where['cores']} cores; {where['pinned']}. {known}.", ""]
    lines += [_describe(results.link) if results.link is not None else "Link: this machine's loopback.", ""]
    lines += _reached(results)
    for runs in by_cell(results.runs):
        done = [run for run in runs if run.skipped is None]
        lines += [f"### {title(runs[0], results)}", "", tables.table(columns(one_process(runs)), done), ""]
        lines += _notes(runs)
    return "\n".join(lines).rstrip() + "\n"


def by_cell(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs of each cell."""
    return [list(group) for _, group in groupby(runs, key=lambda run: run.cell)]


def title(run: Run, results: Results) -> str:
    """Return what is said above a cell's figures."""
    return f"{run.cell}, {results.plan.sampler_of(run.cell.model)}, {results.plan.steps} steps"


def one_process(runs: Sequence[Run]) -> Run | None:
    """Return one process's run among a cell's, if it is there."""
    return next((run for run in runs if run.strategy.text == ALONE and run.skipped is None), None)


def name_of(link: ShapedLink | None) -> str:
    """Return the link in a few words."""
    return "loopback" if link is None else f"link of {link.beta_bytes_per_second / 1e6:.1f} MB/s (all-gathers)"


def _describe(link: ShapedLink) -> str:
    samples = ", ".join(f"{size} B in {1e3 * seconds:.2f} ms" for size, seconds in link.samples)
    line = f"{1e3 * link.alpha_seconds:.2f} ms + bytes / ({link.beta_bytes_per_second / 1e6:.2f} MB/s)"
    return (
        f"Link: `--link {link.asked}`; each direction of each rank's cable shaped by tbf to "
        f"{link.rate_bytes / 1e6:.2f} MB/s; no delay is emulated. All-gathers of gloo on it, bytes of one rank's "
        f"payload: {samples}; fitted: {line}."
    )


def _reached(results: Results) -> list[str]:
    """Return what the wished ratio of the link came to.

    It is the seconds of a synchronous step's keys and values over those that naive computes.
    """
    link = results.link
    if link is None or link.ratio is None:
        return []
    text = f"Ratio reached: {link.ratio:.2f} by the naive images before the run"
    naive = [run.computing() for run in results.runs if run.strategy.text == "naive" and run.skipped is None]
    known = [found for found in naive if found is not None]
    if known:
        kv_bytes, seconds = known[0]
        text += f", {kv_bytes / link.beta_bytes_per_second / seconds:.2f} by naive's steps after warm-up in the run"
    return [f"{text}.", ""]


def columns(alone: Run | None) -> dict[str, Callable[[Run], str]]:
    """Return what the table has of a run, by title; `alone` is what the others in the cell are compared with."""
    return {
        "strategy": lambda run: run.strategy.label,
        "ranks": lambda run: str(run.ranks),
        "ms per step": lambda run: _milliseconds(run.image()),
        "times as fast": lambda run: "" if alone is None else f"{alone.image().median / run.image().median:.2f}",
        "ms after warm-up": lambda run: _milliseconds(run.after_warmup()),
        "ms, displaced steps": lambda run: _milliseconds(run.displaced()),
        "waited, ms per step": lambda run: _milliseconds(_per_step(run, run.waited_seconds)),
        "own work, ms per step": lambda run: _milliseconds(_per_step(run, run.worked_seconds)),
        "CPU, ms per step": lambda run: _milliseconds(run.steady_cpu()),
        "kB of K/V a step": lambda run: _kilobytes(run, "kv"),
        "kB of halo, moments a step": lambda run: _kilobytes(run, "small"),
        "kB of output a step": lambda run: _kilobytes(run, "output"),
    }


def _per_step(run: Run, seconds: Sequence[float] | None) -> Spread | None:
    return None if seconds is None else Spread.of(seconds).scaled(1 / run.steps)


def _milliseconds(spread: Spread | None) -> str:
    if spread is None:
        return ""
    found = spread.scaled(1e3)
    return f"{found.median:.1f} ({found.least:.1f}, {found.most:.1f})"


def _kilobytes(run: Run, kind: str) -> str:
    return "" if run.rank_bytes is None else f"{run.rank_bytes[0][kind] / 1e3:.1f}"


def _notes(runs: Sequence[Run]) -> list[str]:
    """Return what did not run, where windows were, and which rows did not take turns with the others."""
    notes = [f"- {run.strategy.label}: not run: {run.skipped}" for run in runs if run.skipped is not None]
    windows = {run.strategy.label: run.report.get("window") for run in runs if run.report is not None}
    notes += [f"- {label}: the window was {_said(*window)}." for label, window in windows.items() if window]
    later = [run.strategy.label for run in runs if run.skipped is None and run.alternation > 0]
    if later:
        notes.append(f"- Not all fitted into memory at once: {', '.join(later)} took turns after the others were done.")
    return [*notes, ""] if notes else []


def _said(first: int, end: int) -> str:
    """Return a window in words, steps counted from 0."""
    return f"steps {first} to {end - 1}, counted from 0" if end > first else "of no steps"


def plot(results: Results, path: Path) -> None:
    """Draw median milliseconds per step as horizontal bars, least and most as whiskers; a panel for each cell."""
    cells = [found for runs in by_cell(results.runs) if (found := [run for run in runs if run.skipped is None])]
    heights = [0.36 * len(runs) + 1.1 for runs in cells]
    figure = new_figure(9, sum(heights))
    panels = figure.subplots(len(cells), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, runs in zip(panels, cells, strict=True):
        axes.set_title(title(runs[0], results), fontsize=10)
        _panel(axes, runs)
    spread = f"median, least and most of {results.plan.rounds} rounds"
    figure.supxlabel(f"ms per step of the whole image; {name_of(results.link)}; {spread}", fontsize=9)
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, runs: Sequence[Run]) -> None:
    spreads = [run.image().scaled(1e3) for run in runs]
    errors = [[one.median - one.least for one in spreads], [one.most - one.median for one in spreads]]
    colours = [_colour(run) for run in runs]
    places, middles = range(len(runs)), [one.median for one in spreads]
    axes.barh(places, middles, xerr=errors, color=colours, height=0.7, capsize=3, ecolor="0.25")
    axes.set_yticks(places, [f"{run.strategy.label} ({run.ranks})" for run in runs], fontsize=8)
    axes.invert_yaxis()
    reach = max(one.most for one in spreads)
    for place, one in enumerate(spreads):
        axes.annotate(f"{one.median:.1f}", (one.most + 0.01 * reach, place), va="center", fontsize=8)
    axes.set_xlim(0, 1.1 * reach)
    alone = one_process(runs)
    if alone is not None:
        axes.axvline(1e3 * alone.image().median, linestyle="--", color="0.5", linewidth=1)
    axes.grid(True, axis="x", alpha=0.3)


def _colour(run: Run) -> str:
    if run.strategy.variant is None:
        return "0.7"
    return "C1" if run.strategy.variant.preset == "otil" else "C0"
