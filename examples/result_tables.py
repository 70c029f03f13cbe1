"""Make all tables of docs/results/fidelity.md and docs/results/covariance.md anew.

    python examples/result_tables.py --out eval-out
    python examples/result_tables.py --out eval-out --only tiny-sd "4 ranks"
    python examples/result_tables.py --out eval-out --made

Each table is of rows of `otil-xdit eval` over real gloo ranks, which docs/results/fidelity.jsonl keeps: the command may
be interrupted and goes on where it was, rows that several tables have are measured once, and a line that is taken out
is measured again. `--made` measures nothing and fills the tables with the rows that there are. A table stands in its
page between two comments that name it, under the commands that make it and the dates and commits of its rows; the text
round it is nobody's but the author's. The plot and the contact sheet of fidelity.md are made anew with their tables.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from result_cells import Cell, CellStore, cells_of, matrix_of, measure, when_measured
from result_renders import (
    Render,
    clips,
    equivalents,
    grid,
    images,
    in_all,
    model_and_variant,
    network,
    of_a_step,
    place,
    psnr,
    variant,
)

from otil_xdit.tools.eval.cache import ImageCache
from otil_xdit.tools.eval.contact_sheets import write_sheets
from otil_xdit.tools.eval.report import plot
from otil_xdit.tools.eval.rows import make_rows

RESULTS = Path(__file__).resolve().parents[1] / "docs/results"
ROWS = RESULTS / "fidelity.jsonl"

BEFORE = "otil:codec=2bit,coordinates=none"
"""What `otil` was until 2026-11-26."""

SD = "--models tiny-sd --samplers dpm-solver:15"
SDXL = "--models tiny-sdxl --samplers dpm-solver:15"
UNETS = "--models tiny-sd tiny-sdxl --samplers dpm-solver:15"
DIT = "--models tiny-dit --samplers own:15"
STRATEGIES = (
    f"distrifusion otil otil:quality=draft otil:quality=high {BEFORE} otil:freshness=fresh,ratio=1,codec=1bit "
    "compact-1bit compact-2bit otil-paper naive"
)
UNET_STRATEGIES = f"{STRATEGIES} otil:halo=fresh,moments=fresh"
EQUIVALENTS = "--variant log-normal:1 --variant outliers:32 --variant heads:32 --variant rotated:1"
ALL_EQUIVALENTS = (
    "--variant log-normal:0.5 --variant log-normal:1 --variant log-normal:1.5 --variant outliers:8 "
    "--variant outliers:32 --variant heads:32 --variant rotated:1"
)


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
    """Return the runs of all bundled models of images."""
    return f"{UNETS} {line}", f"{DIT} {line}"


TABLES: dict[str, Table] = {
    "tiny-sd": Table("fidelity.md", (f"{SD} --prompts 8 --presets {UNET_STRATEGIES}",), images),
    "tiny-sdxl": Table("fidelity.md", (f"{SDXL} --prompts 8 --presets {UNET_STRATEGIES}",), images),
    "tiny-dit": Table("fidelity.md", (f"{DIT} --prompts 8 --presets {STRATEGIES}",), images),
    "16 images": Table(
        "fidelity.md",
        _each(f"--prompts 8 --seeds 2 --presets {BEFORE} otil"),
        grid(place, variant, of_a_step),
    ),
    "4 ranks": Table(
        "fidelity.md",
        _each("--ranks 4 --prompts 8 --presets distrifusion otil"),
        grid(place, variant, of_a_step),
    ),
    "50 steps": Table(
        "fidelity.md",
        tuple(
            f"--models {model} --samplers {sampler} --prompts 4 --presets distrifusion otil"
            for model, sampler in (("tiny-sd", "ddim:50"), ("tiny-sdxl", "ddim:50"), ("tiny-dit", "own:50"))
        ),
        grid(place, variant, of_a_step),
    ),
    "CFG parallelism": Table(
        "fidelity.md",
        tuple(
            f"{name} {ranks} --prompts 8 --presets distrifusion otil"
            for name in (SD, DIT)
            for ranks in ("--ranks 2", "--ranks 4 --use_cfg_parallel")
        ),
        grid(place, variant, of_a_step),
    ),
    "16 bits": Table(
        "fidelity.md",
        (
            *_each("--prompts 4 --presets distrifusion otil"),
            *_each("--prompts 4 --presets sync distrifusion otil --dtype bfloat16"),
            *_each("--prompts 4 --presets sync distrifusion otil --dtype float16"),
        ),
        grid(place, variant, psnr),
    ),
    "few steps": Table(
        "fidelity.md",
        (
            "--models tiny-sd --samplers dpm-solver:4 dpm-solver:8 dpm-solver:30 euler:8 unipc:8 euler-a:15 "
            "dpm-solver-sde:15 --prompts 4 --presets distrifusion otil",
            "--models tiny-dit --samplers own:4 own:8 own:30 --prompts 4 --presets distrifusion otil",
        ),
        grid(place, variant, in_all),
    ),
    "ingredients": Table(
        "fidelity.md",
        tuple(
            f"{name} --prompts 4 --presets otil otil:coordinates=none otil:extrapolation=none "
            "otil:extrapolation=constant otil:codec=raw,ratio=7/128 otil:score_reference=previous otil:select=random "
            "otil:polling=0.5 otil:fresh_share=0 otil:fresh_share=0,tolerance=0.1 otil:warmup_codec=raw "
            "otil:kv_cache_dtype=float8"
            for name in (SD, DIT)
        ),
        grid(variant, lambda row: row.model, psnr),
    ),
    "LoRA": Table(
        "fidelity.md",
        (f"{SD} --prompts 8 --lora otil_xdit/weights/tiny-sd-lora --presets distrifusion otil",),
        images,
    ),
    "clips": Table(
        "fidelity.md",
        (
            "--models tiny-video --samplers own:15 --frames 9 --prompts 4 "
            "--presets sync distrifusion otil compact-2bit naive",
        ),
        clips,
    ),
    "uneven on 2 ranks": Table(
        "covariance.md",
        (*_each("--prompts 8 --presets distrifusion"), *_each(f"--prompts 8 --presets otil {ALL_EQUIVALENTS}")),
        equivalents,
    ),
    "uneven on 4 ranks": Table(
        "covariance.md",
        (
            *_each("--ranks 4 --prompts 8 --presets distrifusion"),
            *_each(f"--ranks 4 --prompts 8 --presets otil {ALL_EQUIVALENTS}"),
        ),
        equivalents,
    ),
    "the codec of before": Table(
        "covariance.md",
        _each(f"--prompts 4 --presets {BEFORE} distrifusion {EQUIVALENTS}"),
        grid(model_and_variant, network, psnr),
    ),
}
"""All tables by the name that stands in their comments."""

PLOTTED = ("tiny-sd", "tiny-sdxl", "tiny-dit")
"""Tables that the plot is of; it is made where all of them are."""

SHEETS = {"4 ranks": ("sheet-tiny-sd-4-dpm-solver-15.png", "sheet-tiny-sd-4.png")}
"""Of a table, the contact sheet of its first run, and its name beside the pages."""


def main() -> None:
    """Make the tables that were asked for."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("eval-out"), metavar="FOLDER", help="of images and logs")
    parser.add_argument("--only", nargs="+", choices=TABLES, metavar="TABLE", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--made", action="store_true", help="measure nothing")
    parser.add_argument("--dry_run", action="store_true", help="print commands and how many rows are missing, and stop")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help="that an image may take")
    given = parser.parse_args()
    store = CellStore(ROWS)
    names = given.only or list(TABLES)
    for name in names:
        if given.dry_run:
            missing = sum(bool(cell.row.error) for cell in cells(TABLES[name], store))
            print(f"{name}: {missing} rows missing", *(f"    {command(run)}" for run in TABLES[name].runs), sep="\n")
            continue
        if not given.made:
            for run in TABLES[name].runs:
                measure(matrix_of(run), store, given.out, given.timeout)
        write(name, TABLES[name], store)
        if name in SHEETS:
            copy_sheet(TABLES[name].runs[0], store, given.out, *SHEETS[name])
    if not given.dry_run and not given.only:
        store.keep_only(matrix_of(run) for made in TABLES.values() for run in made.runs)
    if not given.dry_run and all(name in names for name in PLOTTED):
        rows = [cell.row for name in PLOTTED for cell in cells(TABLES[name], store)]
        plot([row for row in rows if row.variant != BEFORE], RESULTS / "psnr-bytes.png")


def command(run: str) -> str:
    return f"otil-xdit eval {run}"


def cells(made: Table, store: CellStore) -> list[Cell]:
    return [cell for run in made.runs for cell in cells_of(matrix_of(run), store)]


def write(name: str, made: Table, store: CellStore) -> None:
    """Put a table in its page, which keeps what it has where no row was measured."""
    found = cells(made, store)
    if all(cell.row.error for cell in found):
        print(f"{name}: no row was measured; the page keeps what it has")
        return
    path = RESULTS / made.page
    before, opened, rest = path.read_text().partition(f"<!-- {name} -->\n")
    _, closed, after = rest.partition("\n<!-- end -->")
    assert opened and closed, f"{path} has no comment <!-- {name} --> and <!-- end --> behind it"
    path.write_text(f"{before}{opened}\n{text_of(made, found)}\n{closed}{after}")


def text_of(made: Table, found: Sequence[Cell]) -> str:
    """Return the commands of a table, what its figures are of, and the table."""
    commands = "\n".join(f"    {command(run)}" for run in made.runs)
    measured = [cell for cell in found if not cell.row.error]
    counts = " or ".join(map(str, sorted({cell.row.images for cell in measured})))
    kind = "clips" if measured[0].row.flicker is not None else "images"
    said = f"{counts} {kind} a row, measured {when_measured(measured)}."
    if len(measured) < len(found):
        said += " Empty cells were not measured."
    return f"{commands}\n\n{said}\n\n{made.render([cell.row for cell in found])}"


def copy_sheet(run: str, store: CellStore, out: Path, written: str, target: str) -> None:
    """Draw the contact sheet of a run beside the pages, where the folder has all of its images."""
    matrix = matrix_of(run)
    cache = ImageCache(out / "cache", matrix)
    cases = [case for ranks in matrix.ranks for case in matrix.cases(ranks)]
    if any(cache.missing(case) for case in (*matrix.references, *cases)):
        print(f"{target}: not all of its images are in {out}; the one that there is stays")
        return
    write_sheets(out, matrix, cache, make_rows(matrix, cache, {}), count=4)
    shutil.copy(out / written, RESULTS / target)


if __name__ == "__main__":
    main()
