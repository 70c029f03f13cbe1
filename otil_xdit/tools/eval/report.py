"""Rows as a Markdown table, and PSNR against bytes as a plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from otil_xdit.tools.common.environment import versions
from otil_xdit.tools.common.figures import new_figure
from otil_xdit.tools.common.tables import markdown, number
from otil_xdit.tools.eval.perceptual_metrics import WEIGHTED
from otil_xdit.tools.eval.rows import YARDSTICK, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXACT = 80.0
"""PSNR in dB from which a variant counts as one process up to rounding; it would flatten the others in a plot."""

COLUMNS: dict[str, Callable[[Row], str]] = {
    "variant": lambda row: row.variant,
    "kB of K/V a step": lambda row: number(row.kv_bytes, 1, 1e-3),
    "share a step": lambda row: _percent(row.kv_share),
    "kB of halo, moments a step": lambda row: number(row.small_bytes, 1, 1e-3),
    "kB of K/V in all": lambda row: number(row.kv_total, 1, 1e-3),
    "share in all": lambda row: _percent(row.total_share),
    "PSNR (min) ± std, dB": lambda row: f"{row.psnr:.1f} ({row.psnr_min:.1f}) ± {row.psnr_std:.1f}",
    "SSIM": lambda row: number(row.ssim, 4),
    "seam": lambda row: number(row.seam, 2),
    "flicker": lambda row: number(row.flicker, 2),
    "s": lambda row: number(row.seconds, 2),
}
"""What the table has of a row that did not fail, by title."""

HEADER = """\
PSNR and SSIM against plain diffusers in one process with the same prompt, seed and dtype, images as floats in 0..1;
mean over the images (the worst one), and the standard deviation over them. kB: 1000 bytes that the last rank hands to
collectives: keys, values and what tells their places, in a step (mean over the steps after warm-up) and in all steps,
warm-up included; halo rows and moments of U-Nets. Share: of the row `{yardstick}` in the same table. Seam: how much
steeper the image is across the patches' borders than in the four rows on either side, over the same of one process;
1.00 is one process's. Figures of clips are means over their frames, and flicker is how far the changes from frame to
frame are from one process's, root mean square, in levels of 8 bits. s: seconds of an image, whatever else the machine
did meanwhile: not a benchmark.
"""


def table(rows: Sequence[Row], command: str, absent: Sequence[str]) -> str:
    """Return the rows in Markdown, one table for each place, under a header that says what was measured and how.

    Args:
        rows: in the order in which they are to stand.
        command: the command line that made them.
        absent: metrics that could not be had, and why.
    """
    known = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = [f"    {command}", "", HEADER.format(yardstick=YARDSTICK).rstrip(), "", f"{known}.", ""]
    lines += [f"Not measured: {'; '.join(absent)}.", ""] if absent else []
    for title, group in _by_place(rows):
        count, clips = max(row.images for row in group), any(row.flicker is not None for row in group)
        lines += [f"### {title}, {count} {'clip' if clips else 'image'}{'' if count == 1 else 's'}", ""]
        weighted = [metric.name for metric in WEIGHTED if any(metric.name in row.weighted for row in group)]
        absent = "seam" if clips else "flicker"
        columns = {title: cell for title, cell in COLUMNS.items() if title != absent}
        cells = [_cells(row, columns.values(), weighted) for row in group]
        lines += [markdown([*columns, *weighted], cells), "", *filter(None, map(_note, group))]
    return "\n".join(lines).rstrip() + "\n"


def _by_place(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Return the rows of each place, under what is said above them."""
    groups: defaultdict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.place].append(row)
    return [(_title(group[0]), group) for group in groups.values()]


def _title(row: Row) -> str:
    """Return what a row has in common with those that it stands among."""
    network = f"{Path(row.model).name} {row.network}".rstrip()
    halves = " in two halves" if row.cfg_parallel else ""
    dtype = "" if row.dtype == "float32" else f", {row.dtype}"
    return f"{network}, {row.ranks} ranks{halves}, {row.sampler}, {row.steps} steps{dtype}"


def _cells(row: Row, columns: Collection[Callable[[Row], str]], weighted: Sequence[str]) -> list[str]:
    if row.error:
        return [row.variant, f"failed: {row.error}", *[""] * (len(columns) + len(weighted) - 2)]
    return [*(cell(row) for cell in columns), *(number(row.weighted.get(name), 3) for name in weighted)]


def _note(row: Row) -> str:
    """Return what must be said when the images of a row did not send the same."""
    if row.kv_range is None:
        return ""
    least, most = row.kv_range
    return f"{row.variant}: the images sent {least / 1e3:.1f} to {most / 1e3:.1f} kB of K/V; the table has the mean.\n"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw PSNR against kilobytes of keys and values a step, a panel for each place, a curve for each preset.

    What sends nothing is a dashed line; what is exact, or failed, is left to the legend.
    """
    groups = _by_place(rows)
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure = new_figure(5 * columns, 3.8 * lines)
    presets = list(dict.fromkeys(row.preset for row in rows))
    for index, (title, group) in enumerate(groups):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.set_title(title, fontsize=10)
        _panel(axes, group, presets)
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, rows: Sequence[Row], presets: Sequence[str]) -> None:
    for preset in dict.fromkeys(row.preset for row in rows):
        colour = f"C{presets.index(preset) % 10}"
        for row in (row for row in rows if row.preset == preset):
            _draw_odd(axes, row, colour)
        points = sorted(point for row in rows if row.preset == preset and (point := _point(row)) is not None)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=preset)
    if any(_point(row) for row in rows):  # a logarithmic axis without anything on it is an error
        axes.set_xscale("log")
    axes.set_xlabel("kB of keys and values, a step and rank")
    axes.set_ylabel("PSNR to one process, dB")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=7)


def _point(row: Row) -> tuple[float, float] | None:
    """Return kilobytes and dB, where logarithmic axes have a place for them."""
    if row.error or not row.kv_bytes or row.psnr is None or row.psnr >= EXACT:
        return None
    return row.kv_bytes / 1e3, row.psnr


def _draw_odd(axes: Axes, row: Row, colour: str) -> None:
    """Draw a row without a point on logarithmic axes."""
    if row.error:
        axes.plot([], [], "x", color=colour, label=f"{row.variant}: failed")
    elif row.psnr is not None and row.psnr >= EXACT:
        axes.plot([], [], "^", color=colour, label=f"{row.variant}: {row.psnr:.0f} dB, not drawn")
    elif row.psnr is not None and not row.kv_bytes:
        axes.axhline(row.psnr, linestyle="--", color=colour, label=f"{row.variant}: nothing sent")
