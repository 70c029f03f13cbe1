"""Make all tables of docs/results/fidelity.md and docs/results/covariance.md anew.

    python examples/result_tables.py --out eval-out
    python examples/result_tables.py --out eval-out --only tiny-sd "4 ranks"

Each table is one or a few runs of `otil-xdit eval` over real gloo ranks. Images that the folder has are not made again.
A table stands in its page between two comments that name it, under the commands that made it; the text round it is
nobody's but the author's. The plot and the contact sheet of fidelity.md are made anew with their tables. Two idle cores
take some three hours.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otil_xdit.tools import main as tools
from otil_xdit.tools.common.tables import markdown, table
from otil_xdit.tools.eval.report import plot
from otil_xdit.tools.eval.rows import FLOOR
from otil_xdit.tools.eval.rows import Row as EvalRow

RESULTS = Path(__file__).resolve().parents[1] / "docs/results"

Row = dict[str, Any]
"""A row of ``rows.json``."""

Render = Callable[[Sequence[Row]], str]
"""Makes a table of rows."""

BEFORE = "otil:codec=2bit,coordinates=none"
"""What `otil` was until 2026-11-26."""

UNET = "--models {} --samplers dpm-solver:15"
DIT = "--models {} --samplers own:15"
STRATEGIES = (
    f"distrifusion otil otil:quality=draft otil:quality=high {BEFORE} otil:freshness=fresh,ratio=1,codec=1bit "
    "compact-1bit compact-2bit otil-paper naive"
)
UNET_STRATEGIES = f"{STRATEGIES} otil:halo=fresh,moments=fresh"
EQUIVALENTS = "--variant log-normal:1 --variant outliers:32 --variant heads:32 --variant rotated:1"
FEWER_EQUIVALENTS = "--variant log-normal:1 --variant outliers:32 --variant rotated:1"
MORE_EQUIVALENTS = f"{EQUIVALENTS} --variant log-normal:0.5 --variant log-normal:1.5 --variant outliers:8"


def _share(row: Row, name: str) -> str:
    return "" if row[name] is None else f"{row[name]:.1%}"


def _kilobytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e3:.1f}"


def _psnr(row: Row) -> str:
    return f"{row['psnr']:.1f} ({row['psnr_min']:.1f})"


WHOLE: dict[str, Callable[[Row], str]] = {
    "": lambda row: f"`{row['variant']}`",
    "kB of K/V a step": lambda row: _kilobytes(row["kv_bytes"]),
    "share": lambda row: _share(row, "kv_share"),
    "kB of K/V in all": lambda row: _kilobytes(row["kv_total"]),
    "share in all": lambda row: _share(row, "total_share"),
    "PSNR (worst)": _psnr,
    "SSIM": lambda row: f"{row['ssim']:.4f}",
    "seam": lambda row: "" if row["seam"] is None else f"{row['seam']:.2f}",
}
"""The columns of a table with a line for each row."""


def whole(rows: Sequence[Row]) -> str:
    """Return a table with a line for each row."""
    return table(WHOLE, rows)


def grid(line: Callable[[Row], str], column: Callable[[Row], str], cell: Callable[[Row], str]) -> Render:
    """Return what makes a table with a cell for each row."""

    def render(rows: Sequence[Row]) -> str:
        cells = {(line(row), column(row)): cell(row) for row in rows}
        lines, columns = (list(dict.fromkeys(name(row) for row in rows)) for name in (line, column))
        return markdown(
            ["", *columns], [[name, *(cells.get((name, title), "") for title in columns)] for name in lines]
        )

    return render


def _place(row: Row) -> str:
    halves = " in two halves" if row["cfg_parallel"] else ""
    dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    return f"{row['model']}, {row['ranks']} ranks{halves}, {row['sampler']} {row['steps']}{dtype}"


def _variant(row: Row) -> str:
    return row["variant"] if row["variant"] == FLOOR else f"`{row['variant']}`"


def _network(row: Row) -> str:
    return row["network"] or "shipped"


def _step(row: Row) -> str:
    return f"{_kilobytes(row['kv_bytes'])} kB: {_psnr(row)}, {row['ssim']:.4f}"


def _all(row: Row) -> str:
    return f"{_kilobytes(row['kv_total'])} kB: {_psnr(row)}, {row['seam']:.2f}"


def _model_and_variant(row: Row) -> str:
    return f"{row['model']}, {row['ranks']} ranks, `{row['variant']}`"


@dataclass(frozen=True)
class Table:
    """One table of a page.

    Attributes:
        page: file below `RESULTS`.
        runs: arguments of `otil-xdit eval`.
        render: makes it of the rows of all runs.
    """

    page: str
    runs: tuple[str, ...]
    render: Render


def _each(line: str) -> tuple[str, ...]:
    """Return a run for each bundled model; `{}` in the line stands for it and its sampler."""
    names = UNET.format("tiny-sd"), UNET.format("tiny-sdxl"), DIT.format("tiny-dit")
    return tuple(f"{name} {line}" for name in names)


TABLES: dict[str, Table] = {
    "tiny-sd": Table("fidelity.md", (f"{UNET.format('tiny-sd')} --prompts 8 --presets {UNET_STRATEGIES}",), whole),
    "tiny-sdxl": Table("fidelity.md", (f"{UNET.format('tiny-sdxl')} --prompts 8 --presets {UNET_STRATEGIES}",), whole),
    "tiny-dit": Table("fidelity.md", (f"{DIT.format('tiny-dit')} --prompts 8 --presets {STRATEGIES}",), whole),
    "16 images": Table(
        "fidelity.md",
        _each(f"--prompts 8 --seeds 2 --presets {BEFORE} otil"),
        grid(_place, _variant, _step),
    ),
    "4 ranks": Table(
        "fidelity.md",
        _each("--ranks 4 --prompts 8 --presets distrifusion otil"),
        grid(_place, _variant, _step),
    ),
    "50 steps": Table(
        "fidelity.md",
        tuple(
            f"--models {model} --samplers {sampler} --prompts 4 --presets distrifusion otil"
            for model, sampler in (("tiny-sd", "ddim:50"), ("tiny-sdxl", "ddim:50"), ("tiny-dit", "own:50"))
        ),
        grid(_place, _variant, _step),
    ),
    "CFG parallelism": Table(
        "fidelity.md",
        tuple(
            f"{name} {ranks} --prompts 8 --presets distrifusion otil"
            for name in (UNET.format("tiny-sd"), DIT.format("tiny-dit"))
            for ranks in ("--ranks 2", "--ranks 4 --use_cfg_parallel")
        ),
        grid(_place, _variant, _step),
    ),
    "16 bits": Table(
        "fidelity.md",
        (
            *_each("--prompts 4 --presets distrifusion otil"),
            *_each("--prompts 4 --presets sync distrifusion otil --dtype bfloat16"),
            *_each("--prompts 4 --presets sync distrifusion otil --dtype float16"),
        ),
        grid(_place, _variant, _psnr),
    ),
    "few steps": Table(
        "fidelity.md",
        (
            "--models tiny-sd --samplers dpm-solver:4 dpm-solver:8 dpm-solver:30 euler:8 unipc:8 euler-a:15 "
            "dpm-solver-sde:15 --prompts 4 --presets distrifusion otil",
            "--models tiny-dit --samplers own:4 own:8 own:30 --prompts 4 --presets distrifusion otil",
        ),
        grid(_place, _variant, _all),
    ),
    "ingredients": Table(
        "fidelity.md",
        tuple(
            f"{name} --prompts 4 --presets otil otil:coordinates=none otil:extrapolation=none "
            "otil:extrapolation=constant otil:codec=raw,ratio=7/128 otil:score_reference=previous otil:select=random "
            "otil:polling=0.5 otil:fresh_share=0 otil:fresh_share=0,tolerance=0.1 otil:warmup_codec=raw "
            "otil:kv_cache_dtype=float8"
            for name in (UNET.format("tiny-sd"), DIT.format("tiny-dit"))
        ),
        grid(_variant, lambda row: row["model"], _psnr),
    ),
    "LoRA": Table(
        "fidelity.md",
        (f"{UNET.format('tiny-sd')} --prompts 8 --lora otil_xdit/weights/tiny-sd-lora --presets distrifusion otil",),
        whole,
    ),
    "uneven on 2 ranks": Table(
        "covariance.md",
        (*_each("--prompts 8 --presets distrifusion"), *_each(f"--prompts 8 --presets otil {MORE_EQUIVALENTS}")),
        grid(_model_and_variant, _network, _psnr),
    ),
    "uneven on 4 ranks": Table(
        "covariance.md",
        (
            *_each("--ranks 4 --prompts 8 --presets distrifusion"),
            *_each(f"--ranks 4 --prompts 8 --presets otil {FEWER_EQUIVALENTS}"),
        ),
        grid(_model_and_variant, _network, _psnr),
    ),
    "the codec of before": Table(
        "covariance.md",
        _each(f"--prompts 4 --presets otil {BEFORE} distrifusion {EQUIVALENTS}"),
        grid(_model_and_variant, _network, _psnr),
    ),
}
"""All tables by the name that stands in their comments."""

PLOTTED = ("tiny-sd", "tiny-sdxl", "tiny-dit")
"""Tables that the plot is of; it is made where all of them are."""

SHEETS = {"4 ranks": ("sheet-tiny-sd-4-dpm-solver-15.png", "sheet-tiny-sd-4.png")}
"""Of a table, the contact sheet that its runs write, and its name beside the pages."""


def main() -> None:
    """Make the tables that were asked for."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("eval-out"), metavar="FOLDER", help="images, shared by all")
    parser.add_argument("--only", nargs="+", choices=TABLES, metavar="TABLE", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, and stop")
    given = parser.parse_args()
    made_rows: dict[str, list[Row]] = {}
    for name in given.only or TABLES:
        made = TABLES[name]
        if given.dry_run:
            print(name, *(f"    otil-xdit eval {run}" for run in made.runs), sep="\n")
            continue
        made_rows[name] = [row for run in made.runs for row in rows_of(run, given.out)]
        write(name, made, made_rows[name])
        if name in SHEETS:
            written, target = SHEETS[name]
            shutil.copy(given.out / written, RESULTS / target)
    if all(name in made_rows for name in PLOTTED):
        rows = [row for name in PLOTTED for row in made_rows[name] if row["variant"] != BEFORE]
        plot([as_eval_row(row) for row in rows], RESULTS / "psnr-bytes.png")


def rows_of(run: str, out: Path) -> list[Row]:
    """Return the rows of one run, each of which must have been made."""
    code = tools.main(["eval", *shlex.split(run), "--out", str(out)])
    assert code == 0, f"otil-xdit eval {run}: exit code {code}; what failed stands above"
    found: list[Row] = json.loads((out / "rows.json").read_text())
    return found


def as_eval_row(row: Row) -> EvalRow:
    """Return what a row of ``rows.json`` was written from."""
    return EvalRow(**{name: row[name] for name in EvalRow.__dataclass_fields__})


def write(name: str, made: Table, rows: Sequence[Row]) -> None:
    """Put a table in its page."""
    path = RESULTS / made.page
    commands = "\n".join(f"    otil-xdit eval {run}" for run in made.runs)
    images = sorted({row["images"] for row in rows})
    said = f"{commands}\n\n{' or '.join(map(str, images))} images a cell.\n\n{made.render(rows)}"
    page = re.sub(
        f"(<!-- {re.escape(name)} -->\n).*?(\n<!-- end -->)",
        lambda found: f"{found[1]}\n{said}\n{found[2]}",
        path.read_text(),
        count=1,
        flags=re.DOTALL,
    )
    assert said in page, f"{path} has no comment <!-- {name} --> and <!-- end --> behind it"
    path.write_text(page)


if __name__ == "__main__":
    main()
