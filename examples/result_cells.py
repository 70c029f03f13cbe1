"""Rows of `otil-xdit eval`, kept in a file: tables are made of them, and only what is missing is measured.

A row is kept under everything that says what it is: model, sampler, ranks, network, all settings of the strategy,
prompts and seeds. So a strategy whose defaults change has no rows any more, and a run that is interrupted goes on where
it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import otil_xdit
from otil_xdit.tools.common.jobs import jobs_of_a_run
from otil_xdit.tools.eval.cache import ImageCache
from otil_xdit.tools.eval.cli import add_arguments, read_matrix
from otil_xdit.tools.eval.generate import ImageMaker
from otil_xdit.tools.eval.matrix import Case, Matrix
from otil_xdit.tools.eval.rows import Row, make_row, make_rows, with_shares
from otil_xdit.xdit.launcher.processes import caught_signals


@dataclass(frozen=True)
class Cell:
    """A row as it was measured.

    Attributes:
        row: its figures; shares are None, as they depend on the rows beside it.
        commit: of the code, shortened; empty outside a checkout.
        date: of the measurement, as 2026-11-27.
    """

    row: Row
    commit: str
    date: str


class CellStore:
    """The rows that have been measured, in a file with a line of JSON for each.

    Args:
        path: of the file; made with its folder at the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records = self._read()

    def load(self, matrix: Matrix, case: Case) -> Cell | None:
        """Return a case's row, or None where it was not measured."""
        found = self._records.get(_key(matrix, case))
        if found is None:
            return None
        row = Row(**found["row"])
        if case.variant is not None:  # the same settings may have been asked for in other words
            row = replace(row, variant=case.variant.text)
        return Cell(row, found["commit"], found["date"])

    def save(self, matrix: Matrix, case: Case, cell: Cell) -> None:
        """Keep a row, beside those that another process may have written since.

        Shares, which depend on the rows beside it, and what is told of each step are left out.
        """
        figures = asdict(replace(cell.row, kv_share=None, total_share=None, windows=(), discrepancies=()))
        row = {name: value for name, value in figures.items() if value not in (None, "", (), {})}
        key = _key(matrix, case)
        self._write({**self._read(), key: {"key": key, "row": row, "commit": cell.commit, "date": cell.date}})

    def keep_only(self, runs: Iterable[Matrix]) -> None:
        """Drop all rows but those of `runs`: what a strategy with other defaults left is in no table any more."""
        keys = {_key(matrix, case) for matrix in runs for case in cases_of(matrix)}
        self._write({key: record for key, record in self._read().items() if key in keys})

    def _read(self) -> dict[str, dict[str, Any]]:
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        return {record["key"]: record for record in map(json.loads, lines)}

    def _write(self, records: dict[str, dict[str, Any]]) -> None:
        """Replace the file, which is complete at any time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in records.values()))
        os.replace(unfinished, self.path)
        self._records = records


def _key(matrix: Matrix, case: Case) -> str:
    """Return a short name of everything that says which row a case's is."""
    text = json.dumps(facts(matrix, case), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def facts(matrix: Matrix, case: Case) -> dict[str, Any]:
    """Return what says which row a case's is."""
    variant = case.variant
    settings = {} if variant is None else {name: value for name, value in variant.settings.items() if name != "timeout"}
    return {
        "model": case.model.label,
        "sampler": str(case.sampler),
        "ranks": case.ranks,
        "preset": "" if variant is None else variant.preset,
        "settings": settings,
        "network": "" if case.equivalent is None else case.equivalent.text,
        "cfg_parallel": case.cfg_parallel,
        "dtype": str(matrix.dtype),
        "calls": [[call.prompt, call.seed] for call in matrix.calls],
        "guidance": matrix.guidance,
        "size": matrix.size,
        "frames": matrix.frames if case.model.frames else 0,
        "lora": "" if matrix.lora is None else Path(matrix.lora).parent.name,
    }


def matrix_of(run: str) -> Matrix:
    """Return what the arguments of `otil-xdit eval` ask for."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return read_matrix(parser.parse_args(shlex.split(run)))


def cases_of(matrix: Matrix) -> list[Case]:
    """Return the case of every row, in the order in which they stand in a table."""
    return [case for ranks in matrix.ranks for case in (*matrix.floors(ranks), *matrix.cases(ranks))]


def cells_of(matrix: Matrix, store: CellStore) -> list[Cell]:
    """Return every row, with its shares; those that were not measured have `Row.error`, and no date."""
    cells = [store.load(matrix, case) or not_measured(matrix, case) for case in cases_of(matrix)]
    rows = with_shares([cell.row for cell in cells])
    return [replace(cell, row=row) for cell, row in zip(cells, rows, strict=True)]


def not_measured(matrix: Matrix, case: Case) -> Cell:
    """Return a row without figures."""
    return Cell(make_row(case, matrix, None, "not measured"), "", "")


def measure(matrix: Matrix, store: CellStore, out: Path, timeout: float) -> None:
    """Measure the rows that are missing, the rows of each network on their own, and keep each as soon as it is there.

    Args:
        matrix: whose rows are wanted.
        store: that they are kept in.
        out: folder of the images and of the ranks' logs.
        timeout: seconds that an image may take.

    Raises:
        RuntimeError: naming the cases that failed, when all others have been tried.
    """
    failures: dict[Case, str] = {}
    for part in _parts(matrix):
        missing = [case for case in cases_of(part) if store.load(part, case) is None]
        if not missing:
            continue
        variants = tuple(variant for variant in part.variants if any(case.variant == variant for case in missing))
        part = replace(part, variants=variants or part.variants)  # where only the noise floor is missing
        cache = ImageCache(out / "cache", part)
        with caught_signals() as caught, jobs_of_a_run(out / "logs", timeout, caught) as jobs:
            failed = ImageMaker(part, cache, jobs).make(1)
        for case, row in make_rows(part, cache, failed).items():
            if case not in failed:
                store.save(part, case, Cell(row, commit(), time.strftime("%Y-%m-%d")))
        failures |= failed
    if failures:
        raise RuntimeError("; ".join(f"{case}: {reason}" for case, reason in failures.items()))


def _parts(matrix: Matrix) -> Iterator[Matrix]:
    """Split a matrix into those of one model, number of ranks, sampler and network."""
    for model, ranks in product(matrix.models, matrix.ranks):
        for sampler, equivalent in product(matrix.samplers_of(model), matrix.equivalents):
            parts = {"models": (model,), "ranks": (ranks,), "samplers": (sampler,), "equivalents": (equivalent,)}
            yield replace(matrix, **parts)


def commit() -> str:
    """Return the shortened commit of the package's code; empty outside a checkout."""
    folder = Path(otil_xdit.__file__).parent
    git = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def when_measured(cells: Sequence[Cell]) -> str:
    """Return the dates of rows, and the commits of each."""
    dates: dict[str, dict[str, None]] = {}
    for cell in sorted(cells, key=lambda cell: cell.date):
        dates.setdefault(cell.date, {})[cell.commit or "no commit"] = None
    return " and ".join(f"on {date} ({', '.join(commits)})" for date, commits in dates.items())
