"""How time and bytes of a step grow with the number of ranks, and with the size of the latent, as plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from otil_xdit.tools.bench.plan import ALONE, parse_strategy
from otil_xdit.tools.bench.report import name_of
from otil_xdit.tools.bench.results import Results, Run, Spread
from otil_xdit.tools.common.environment import machine
from otil_xdit.tools.common.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ONE = parse_strategy(ALONE).label

Points = dict[str, dict[int, Spread]]
"""By strategy, then by where on the x axis."""

ABOUT = """\
Steps after each strategy's warm-up (all steps, where it has none); median, least and most of {rounds} rounds; {link}.
The ranks share {cores} cores: with more ranks than those, ms per step is not a speed. CPU: the busiest rank's main
thread without its waiting, which is what a device of its own would have to compute. Bytes are counted, of the rank that
hands most to collectives; an all-gather of keys and values brings as many from each of the other ranks."""

MARKERS = "osD^vP*X"

RANKS, LATENTS = "ranks", "latent side"
"""The x axes."""


def plot_over_ranks(results: Results, path: Path) -> None:
    """Draw time and bytes of a step over the number of ranks, a row of panels for each model and size.

    One process's run of each cell is the point at 1; the dashed line is its time over the number of ranks. Nothing is
    written where there is one number of ranks above 1.
    """
    if len({run.cell.ranks for run in results.runs} - {1}) > 1:
        _plot(results, path, RANKS, lambda run: run.ranks)


def plot_over_latents(results: Results, path: Path) -> None:
    """Draw time and bytes of a step over the side of the latent, a row of panels for each model and number of ranks.

    Nothing is written where there is one size.
    """
    if len({run.cell.latent for run in results.runs}) > 1:
        _plot(results, path, LATENTS, lambda run: run.cell.latent[0])


def _milliseconds(spread: Spread | None) -> Spread | None:
    return None if spread is None else spread.scaled(1e3)


def _most_kilobytes(run: Run, kind: str) -> Spread | None:
    """Return the kB of the rank that hands over most of a kind."""
    return None if run.rank_bytes is None else Spread.of([max(sent[kind] for sent in run.rank_bytes) / 1e3])


PANELS: dict[str, Callable[[Run], Spread | None]] = {
    "ms per step": lambda run: _milliseconds(run.steady()),
    "CPU, ms per rank and step": lambda run: _milliseconds(run.steady_cpu()),
    "keys and values, kB handed over a step": lambda run: _most_kilobytes(run, "kv"),
    "halo and moments, kB handed over a step": lambda run: _most_kilobytes(run, "small"),
}
"""What is drawn, by title."""

TIMES = tuple(PANELS)[:2]


def points(runs: Sequence[Run], place: Callable[[Run], int], figure: Callable[[Run], Spread | None]) -> Points:
    """Return the figure of every run that has one; of several at one place the one whose median is the middle one."""
    found: defaultdict[str, defaultdict[int, list[Spread]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        value = None if run.skipped is not None else figure(run)
        if value is not None:
            found[run.strategy.label][place(run)].append(value)
    return {
        label: {where: _middle(values) for where, values in sorted(places.items())} for label, places in found.items()
    }


def _middle(spreads: Sequence[Spread]) -> Spread:
    return sorted(spreads, key=lambda spread: spread.median)[len(spreads) // 2]


def _plot(results: Results, path: Path, axis: str, place: Callable[[Run], int]) -> None:
    rows: defaultdict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in results.runs:
        rows[run.cell.model.name, _title(run, axis)].append(run)
    figure = new_figure(4 * len(PANELS), 3.4 * len(rows) + 1.2)
    panels = figure.subplots(len(rows), len(PANELS), squeeze=False)
    labels = list(dict.fromkeys(run.strategy.label for run in results.runs))
    for line, ((_, row), runs) in zip(panels, rows.items(), strict=True):
        line[0].set_ylabel(row, fontsize=8)
        for axes, (title, value) in zip(line, PANELS.items(), strict=True):
            axes.set_title(title, fontsize=10)
            found = points(runs, place, value)
            _panel(axes, _from_one(found) if axis == RANKS else found, axis, labels)
            if axis == RANKS and title in TIMES:
                _ideal(axes, runs, value)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    about = ABOUT.format(rounds=results.plan.rounds, cores=machine()["cores"], link=name_of(results.link))
    figure.supxlabel(about, fontsize=8)
    figure.savefig(path, dpi=110)


def _from_one(found: Points) -> Points:
    """Let every strategy's line begin where one process is."""
    start = found.get(ONE, {})
    return {label: {**start, **places} for label, places in found.items()}


def _panel(axes: Axes, found: Points, axis: str, labels: Sequence[str]) -> None:
    for label, places in found.items():
        number, spreads = labels.index(label), list(places.values())
        axes.errorbar(
            list(places),
            [one.median for one in spreads],
            yerr=[[one.median - one.least for one in spreads], [one.most - one.median for one in spreads]],
            color=f"C{number}",
            marker=MARKERS[number % len(MARKERS)],
            markersize=max(3, 9 - number),  # those drawn later are seen on top of equal ones
            linewidth=1,
            capsize=3,
            alpha=0.8,
            label=label,
        )
    ticks = sorted({where for places in found.values() for where in places})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(axis, fontsize=8)
    if axis == LATENTS and any(spread.median > 0 for places in found.values() for spread in places.values()):
        axes.set_yscale("log", nonpositive="mask")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.3)


def _ideal(axes: Axes, runs: Sequence[Run], figure: Callable[[Run], Spread | None]) -> None:
    """Draw one process's time in each cell over the cell's ranks."""
    found = {run.cell.ranks: figure(run) for run in runs if run.strategy.text == ALONE and run.skipped is None}
    shared = {ranks: spread.median / ranks for ranks, spread in sorted(found.items()) if spread is not None}
    axes.plot(
        list(shared), list(shared.values()), linestyle="--", color="0.4", linewidth=1, label="one process / ranks"
    )


def _title(run: Run, axis: str) -> str:
    """Return what the runs of a row of panels have in common."""
    cell = run.cell
    wide = f", {cell.width} times as wide" if cell.width > 1 else ""
    rest = f"latent {cell.latent[0]} x {cell.latent[1]}" if axis == RANKS else f"{cell.ranks} ranks"
    return f"{cell.model.label}{wide}\n{rest}"
