"""What a bench found as a Markdown table and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from otil_xdit.tools.bench.calibrate import Link
from otil_xdit.tools.bench.plan import ALONE
from otil_xdit.tools.bench.results import Results, Run, Spread
from otil_xdit.tools.common.environment import machine, versions
from otil_xdit.tools.common.figures import new_figure
from otil_xdit.tools.common.tables import markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (
    "strategy",
    "ranks",
    "ms per step",
    "times as fast",
    "ms after warm-up",
    "ms, displaced steps",
    "waited, ms per step",
    "own work, ms per step",
    "CPU, ms per step",
    "kB of K/V a step",
    "kB of halo, moments a step",
    "kB of output a step",
)

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
    """The rows in Markdown, a table for each cell, under a header that says what was measured and how."""
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
        rows = [_cells(run, runs) for run in runs if run.skipped is None]
        lines += [f"### {title(runs[0], results)}", "", markdown(COLUMNS, rows)]
        lines += ["", *_notes(runs)]
    return "\n".join(lines).rstrip() + "\n"


def by_cell(runs: Sequence[Run]) -> list[list[Run]]:
    return [list(group) for _, group in groupby(runs, key=lambda run: run.cell)]


def title(run: Run, results: Results) -> str:
    return f"{run.cell}, {results.plan.sampler_of(run.cell.model)}, {results.plan.steps} steps"


def alone(runs: Sequence[Run]) -> Run | None:
    """One process's run among a cell's, if it is there."""
    return next((run for run in runs if run.strategy.text == ALONE and run.skipped is None), None)


def name_of(link: Link | None) -> str:
    """The link in a few words."""
    return "loopback" if link is None else f"link of {link.beta_bytes_per_second / 1e6:.1f} MB/s (all-gathers)"


def _describe(link: Link) -> str:
    samples = ", ".join(f"{size} B in {1e3 * seconds:.2f} ms" for size, seconds in link.samples)
    line = f"{1e3 * link.alpha_seconds:.2f} ms + bytes / ({link.beta_bytes_per_second / 1e6:.2f} MB/s)"
    return (
        f"Link: `--link {link.asked}`; each direction of each rank's cable shaped by tbf to "
        f"{link.rate_bytes / 1e6:.2f} MB/s; no delay is emulated. All-gathers of gloo on it, bytes of one rank's "
        f"payload: {samples}; fitted: {line}."
    )


def _reached(results: Results) -> list[str]:
    """What the wished ratio of the link came to: seconds of a synchronous step's keys and values over those that naive
    computes."""
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


def _cells(run: Run, runs: Sequence[Run]) -> tuple[str, ...]:
    image, best = run.image(), alone(runs)
    report = run.report or {}
    waited, worked = (
        None if seconds is None else Spread.of([one / run.steps for one in seconds])
        for seconds in (run.waited_seconds, run.worked_seconds)
    )
    kinds = ("kv_bytes_per_step", "small_bytes_per_step", "output_bytes_per_step")
    return (
        run.strategy.label,
        str(run.ranks),
        _milliseconds(image),
        "" if best is None else f"{best.image().median / image.median:.2f}",
        _milliseconds(run.after_warmup()),
        _milliseconds(run.displaced()),
        _milliseconds(waited),
        _milliseconds(worked),
        _milliseconds(run.steady_cpu()),
        *(f"{report[kind] / 1e3:.1f}" if kind in report else "" for kind in kinds),
    )


def _milliseconds(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{1e3 * spread.median:.1f} ({1e3 * spread.least:.1f}, {1e3 * spread.most:.1f})"


def _notes(runs: Sequence[Run]) -> list[str]:
    """What did not run, where windows were, and which rows did not take turns with the others."""
    notes = [f"- {run.strategy.label}: not run: {run.skipped}" for run in runs if run.skipped is not None]
    windows = {run.strategy.label: run.report.get("window") for run in runs if run.report is not None}
    notes += [f"- {label}: the window was {_said(*window)}." for label, window in windows.items() if window]
    later = [run.strategy.label for run in runs if run.skipped is None and run.alternation > 0]
    if later:
        notes.append(f"- Not all fitted into memory at once: {', '.join(later)} took turns after the others were done.")
    return [*notes, ""] if notes else []


def _said(first: int, end: int) -> str:
    """A window in words, steps counted from 0."""
    return f"steps {first} to {end - 1}, counted from 0" if end > first else "of no steps"


def plot(results: Results, path: Path) -> None:
    """Median milliseconds per step as horizontal bars, least and most as whiskers; a panel for each cell."""
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
    spreads = [run.image() for run in runs]
    middles = [1e3 * spread.median for spread in spreads]
    below = [1e3 * (spread.median - spread.least) for spread in spreads]
    above = [1e3 * (spread.most - spread.median) for spread in spreads]
    colours = [_colour(run) for run in runs]
    places = range(len(runs))
    axes.barh(places, middles, xerr=[below, above], color=colours, height=0.7, capsize=3, ecolor="0.25")
    axes.set_yticks(places, [f"{run.strategy.label} ({run.ranks})" for run in runs], fontsize=8)
    axes.invert_yaxis()
    reach = max(middle + more for middle, more in zip(middles, above, strict=True))
    for place, (middle, more) in enumerate(zip(middles, above, strict=True)):
        axes.annotate(f"{middle:.1f}", (middle + more + 0.01 * reach, place), va="center", fontsize=8)
    axes.set_xlim(0, 1.1 * reach)
    best = alone(runs)
    if best is not None:
        axes.axvline(1e3 * best.image().median, linestyle="--", color="0.5", linewidth=1)
    axes.grid(True, axis="x", alpha=0.3)


def _colour(run: Run) -> str:
    kinds: tuple[tuple[Callable[[Run], bool], str], ...] = (
        (lambda run: run.strategy.variant is None, "0.7"),
        (lambda run: run.strategy.variant is not None and run.strategy.variant.preset == "otil", "C1"),
    )
    return next((colour for fits, colour in kinds if fits(run)), "C0")
