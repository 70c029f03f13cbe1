"""The selection study as files: JSON, Markdown tables, figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selection import METRICS, SOURCES, TRUTHS, Row, Settings, distinct, fraction, select

COLOURS = dict(zip(METRICS, ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#888888"), strict=True))
"""One a metric, in every figure."""


def write_report(folder: Path, settings: Settings, rows: Sequence[Row], command: str, versions: dict[str, str]) -> None:
    """study.json, table.md, study.png and study-steps.png in `folder`, which is made if it is absent."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "command": command,
        "versions": versions,
        "settings": asdict(settings),
        "notes": settings.notes(),
        "rows": [row.to_dict() for row in rows],
    }
    (folder / "study.json").write_text(json.dumps(whole, indent=1) + "\n")
    (folder / "table.md").write_text(tables(settings, rows))
    draw_bars(rows, folder / "study.png")
    draw_steps(rows, folder / "study-steps.png")


def tables(settings: Settings, rows: Sequence[Row]) -> str:
    """Markdown: for each place of the score and each truth, metrics and models down, blocks and ratios across."""
    images, steps = settings.prompts * settings.seeds, settings.steps
    lines = [
        f"Area under the ROC curve, mean over {images} images and {steps - 1} pairs of steps; 0.5 is chance. The "
        f"largest standard error over the images is {max(row.error for row in rows):.3f}.",
    ]
    for source, where in SOURCES.items():
        for truth, target in TRUTHS.items():
            lines += ["", f"### Score on {where}; pixels ranked by {target}", ""]
            lines += _table(select(rows, source=source, truth=truth))
    notes = settings.notes()
    return "\n".join(lines + [""] * bool(notes) + [f"- {note}" for note in notes]) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    columns = sorted({(row.block, row.ratio) for row in rows}, key=lambda column: (column[0], -column[1]))
    titles = [f"block {block}, {fraction(ratio)}" for block, ratio in columns]
    lines = ["| model | metric | " + " | ".join(titles) + " |", "|---" * (len(columns) + 2) + "|"]
    for model in distinct(rows, "model"):
        for metric in distinct(rows, "metric"):
            found = [select(rows, model=model, metric=metric, block=block, ratio=ratio) for block, ratio in columns]
            shown = [f"{cell[0].auc:.3f}" if cell else "" for cell in found]
            lines.append(f"| {model} | {metric} | " + " | ".join(shown) + " |")
    return lines


def draw_bars(rows: Sequence[Row], path: Path) -> None:
    """A panel for each block and ratio: bars by metric against the same metric on pixels, a dot against L2 there."""
    seen = select(rows, source="latent")
    blocks, ratios = sorted(distinct(seen, "block")), sorted(distinct(seen, "ratio"), reverse=True)
    figure, panels = _panels(len(blocks), len(ratios))
    metrics, models = distinct(seen, "metric"), distinct(seen, "model")
    width = 0.8 / len(metrics)
    for line, block in zip(panels, blocks, strict=True):
        for panel, ratio in zip(line, ratios, strict=True):
            here = select(seen, block=block, ratio=ratio)
            if not here:
                panel.set_axis_off()
                continue
            for index, metric in enumerate(metrics):
                place = [at + (index - (len(metrics) - 1) / 2) * width for at in range(len(models))]
                _bars(panel, here, metric, models, place, width)
            panel.axhline(0.5, color="black", linestyle="--", linewidth=0.8)
            panel.set(title=f"block {block}, ratio {fraction(ratio)} ({here[0].regions} regions)", ylim=(0.2, 1.0))
            panel.set_xticks(range(len(models)), models)
            panel.set_ylabel("AUC")
    _legend(figure, metrics)
    figure.suptitle("Change of the latent as a sign of change of the image. Bar: same metric on pixels, dot: L2 there")
    figure.savefig(path, dpi=110)


def _bars(panel: Any, rows: Sequence[Row], metric: str, models: list[str], place: list[float], width: float) -> None:
    for model, at in zip(models, place, strict=True):
        for row in select(rows, metric=metric, model=model, truth="same"):
            panel.bar(at, row.auc - 0.5, width, bottom=0.5, yerr=row.error, color=COLOURS[metric], error_kw={"lw": 0.8})
        for row in select(rows, metric=metric, model=model, truth="l2"):
            panel.plot(at, row.auc, "o", markersize=3.5, color="black", markerfacecolor="white")


def draw_steps(rows: Sequence[Row], path: Path) -> None:
    """AUC over the steps for the smallest block and the middle ratio: a row for each truth, a column for each model."""
    seen = select(rows, source="latent", block=min(row.block for row in rows))
    ratios, models = sorted(distinct(seen, "ratio")), distinct(seen, "model")
    ratio = ratios[len(ratios) // 2]
    figure, panels = _panels(len(TRUTHS), len(models))
    for line, (truth, target) in zip(panels, TRUTHS.items(), strict=True):
        for panel, model in zip(line, models, strict=True):
            for row in select(seen, truth=truth, model=model, ratio=ratio):
                panel.plot(range(1, len(row.by_step) + 1), row.by_step, color=COLOURS[row.metric], linewidth=1.2)
                panel.set_xticks(range(1, len(row.by_step) + 1, max(1, len(row.by_step) // 7)))
            panel.axhline(0.5, color="black", linestyle="--", linewidth=0.8)
            panel.set(title=f"{model}, pixels ranked by {target}", xlabel="step", ylabel="AUC", ylim=(0.2, 1.0))
    _legend(figure, distinct(seen, "metric"))
    figure.suptitle(f"AUC from each step to the next, block {seen[0].block}, ratio {fraction(ratio)}")
    figure.savefig(path, dpi=110)


def _panels(lines: int, columns: int) -> tuple[Any, Any]:
    # Not pyplot: it would ask for a display and keep the figure for ever.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 2.9 * lines + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines, columns, squeeze=False)


def _legend(figure: Any, metrics: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=COLOURS[metric], label=metric) for metric in metrics]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
