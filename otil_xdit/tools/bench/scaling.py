"""How time and bytes of a step grow with the number of ranks, and with the size of the latent, as plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
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


def plot_over_ranks(results: Results, path: Path) -> None:
    """Time and bytes of a step over the number of ranks, a row of panels for each model and size; nothing is written
    where there is one number of ranks above 1.

    One process's run of each cell is the point at 1; the dashed line is its time over the number of ranks.
    """
    if len({run.cell.ranks for run in results.runs} - {1}) > 1:
        _plot(results, path, "ranks", _place_of_ranks, lambda run: (run.cell.model.name, run.cell.size))


def plot_over_latents(results: Results, path: Path) -> None:
    """Time and bytes of a step over the side of the latent, a row of panels for each model and number of ranks; nothing
    is written where there is one size."""
    if len({run.cell.latent for run in results.runs}) > 1:
        _plot(results, path, "latent side", _place_of_latent, lambda run: (run.cell.model.name, run.cell.ranks))


def _place_of_ranks(run: Run) -> int:
    return run.ranks


def _place_of_latent(run: Run) -> int:
    return run.cell.latent[0]


def _seconds(run: Run) -> Spread | None:
    return _scaled(run.steady(), 1e3)


def _cpu_seconds(run: Run) -> Spread | None:
    return _scaled(run.steady_cpu(), 1e3)


def _scaled(spread: Spread | None, factor: float) -> Spread | None:
    return None if spread is None else Spread(*(factor * value for value in (spread.median, spread.least, spread.most)))


def _bytes(*kinds: str) -> Callable[[Run], Spread | None]:
    """kB of the rank that hands over most of these kinds."""

    def most(run: Run) -> Spread | None:
        if run.rank_bytes is None:
            return None
        return Spread.of([max(sum(sent[kind] for kind in kinds) for sent in run.rank_bytes) / 1e3])

    return most


PANELS: dict[str, Callable[[Run], Spread | None]] = {
    "ms per step": _seconds,
    "CPU, ms per rank and step": _cpu_seconds,
    "keys and values, kB handed over a step": _bytes("kv"),
    "halo and moments, kB handed over a step": _bytes("small"),
}


def points(runs: Sequence[Run], place: Callable[[Run], int], figure: Callable[[Run], Spread | None]) -> Points:
    """The figure of every run that has one; of several runs at one place the one whose median is the middle one."""
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


def _plot(
    results: Results, path: Path, axis: str, place: Callable[[Run], int], row_of: Callable[[Run], Hashable]
) -> None:
    rows: dict[Hashable, list[Run]] = {}
    for run in results.runs:
        rows.setdefault(row_of(run), []).append(run)
    figure = new_figure(4 * len(PANELS), 3.4 * len(rows) + 1.2)
    panels = figure.subplots(len(rows), len(PANELS), squeeze=False)
    labels = list(dict.fromkeys(run.strategy.label for run in results.runs))
    for line, runs in zip(panels, rows.values(), strict=True):
        for axes, (title, value) in zip(line, PANELS.items(), strict=True):
            found = points(runs, place, value)
            _panel(axes, _from_one(found) if axis == "ranks" else found, axis, labels)
            axes.set_title(title, fontsize=10)
        line[0].set_ylabel(_title(runs[0], axis), fontsize=8)
        if axis == "ranks":
            for axes, value in zip(line[:2], (_seconds, _cpu_seconds), strict=True):
                _ideal(axes, runs, value)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    about = ABOUT.format(rounds=results.plan.rounds, cores=machine()["cores"], link=name_of(results.link))
    figure.supxlabel(about, fontsize=8)
    figure.savefig(path, dpi=110)


def _from_one(found: Points) -> Points:
    """Every strategy's line begins where one process is."""
    start = found.get(ONE, {})
    return {label: {**start, **places} for label, places in found.items()}


def _panel(axes: Axes, found: Points, axis: str, labels: Sequence[str]) -> None:
    for label, places in found.items():
        number = labels.index(label)
        middles = [spread.median for spread in places.values()]
        below = [spread.median - spread.least for spread in places.values()]
        above = [spread.most - spread.median for spread in places.values()]
        axes.errorbar(
            list(places),
            middles,
            yerr=[below, above],
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
    if axis == "latent side" and any(spread.median > 0 for places in found.values() for spread in places.values()):
        axes.set_yscale("log", nonpositive="mask")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.3)


def _ideal(axes: Axes, runs: Sequence[Run], figure: Callable[[Run], Spread | None]) -> None:
    """One process's time in each cell over the cell's ranks."""
    found = {run.cell.ranks: figure(run) for run in runs if run.strategy.text == ALONE and run.skipped is None}
    shared = {ranks: spread.median / ranks for ranks, spread in sorted(found.items()) if spread is not None}
    axes.plot(
        list(shared), list(shared.values()), linestyle="--", color="0.4", linewidth=1, label="one process / ranks"
    )


def _title(run: Run, axis: str) -> str:
    cell = run.cell
    wide = f", {cell.width} times as wide" if cell.width > 1 else ""
    rest = f"latent {cell.latent[0]} x {cell.latent[1]}" if axis == "ranks" else f"{cell.ranks} ranks"
    return f"{cell.model.label}{wide}\n{rest}"
