"""Tables of the result pages: rows are kept by what they are, only missing ones are measured, pages keep the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import result_cells
import result_tables
from result_cells import Cell, CellStore, cases_of, cells_of, matrix_of, measure, when_measured
from result_renders import equivalents
from result_tables import RESULTS, TABLES, Table, write

from otil_xdit.tools.eval.matrix import Case, Matrix
from otil_xdit.tools.eval.rows import make_row

RUN = "--models tiny-sd --samplers dpm-solver:3 --prompts 2 --presets distrifusion otil --variant outliers:32"


def cell(matrix: Matrix, case: Case, **figures: Any) -> Cell:
    known = {"psnr": 50.0, "psnr_min": 40.0, "ssim": 1.0, "seam": 1.0, "kv_bytes": 1e3, "kv_total": 3e3, "images": 2}
    row = replace(make_row(case, matrix, None, ""), **{**known, **figures})
    return Cell(row, "abc1234", "2026-11-27")


@pytest.fixture
def store(tmp_path: Path) -> CellStore:
    return CellStore(tmp_path / "rows.jsonl")


def saved(store: CellStore, run: str, **figures: Any) -> None:
    matrix = matrix_of(run)
    for case in cases_of(matrix):
        store.save(matrix, case, cell(matrix, case, **figures))


def test_a_row_is_found_by_what_it_is(store: CellStore) -> None:
    saved(store, RUN)
    assert all(not found.row.error for found in cells_of(matrix_of(RUN), store))
    others = {
        "steps": RUN.replace(":3", ":4"),
        "prompts": RUN.replace("--prompts 2", "--prompts 1"),
        "ranks": f"{RUN} --ranks 4",
        "dtype": f"{RUN} --dtype float16",
        "network": RUN.replace("outliers:32", "outliers:8"),
        "settings": RUN.replace("otil", "otil:ratio=1/2"),
        "halves": f"{RUN} --ranks 4 --use_cfg_parallel",
    }
    for name, run in others.items():
        assert any(found.row.error for found in cells_of(matrix_of(run), store)), name
    same = RUN.replace("presets distrifusion otil", "presets otil:timeout=7")
    assert [found.row.variant for found in cells_of(matrix_of(same), store)] == ["otil:timeout=7"] * 2


def test_rows_are_read_again_and_those_of_another_process_stay(store: CellStore) -> None:
    matrix = matrix_of(RUN)
    first, second, third, _ = cases_of(matrix)
    store.save(matrix, first, cell(matrix, first, psnr=41.0))
    CellStore(store.path).save(matrix, second, cell(matrix, second, psnr=42.0))
    store.save(matrix, third, cell(matrix, third, psnr=43.0))
    store.save(matrix, first, cell(matrix, first, psnr=44.0))
    found = [kept.row.psnr for kept in cells_of(matrix, CellStore(store.path))]
    assert found == [44.0, 42.0, 43.0, None]
    assert len(store.path.read_text().splitlines()) == 3


def test_rows_that_no_table_has_are_dropped(store: CellStore) -> None:
    saved(store, RUN)
    saved(store, RUN.replace("otil", "otil:ratio=1/2"))
    store.keep_only([matrix_of(RUN)])
    assert len(store.path.read_text().splitlines()) == 4
    assert not any(found.row.error for found in cells_of(matrix_of(RUN), CellStore(store.path)))


def test_shares_are_of_the_rows_beside_it(store: CellStore) -> None:
    saved(store, RUN)
    matrix = matrix_of(RUN)
    (case,) = (case for case in cases_of(matrix) if case.equivalent is None and case.variant.text == "otil")
    store.save(matrix, case, cell(matrix, case, kv_bytes=250.0, kv_share=0.9))
    shares = {found.row.kv_share for found in cells_of(matrix, store) if found.row.variant == "otil"}
    assert shares == {0.25, 1.0}


def test_only_what_is_missing_is_measured(store: CellStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupted run has the shipped network's rows, and one of the equivalent's two."""
    matrix, asked = matrix_of(RUN), []
    for case in cases_of(matrix)[:3]:
        store.save(matrix, case, cell(matrix, case))

    class Maker:
        def __init__(self, part: Matrix, cache: Any, jobs: Any) -> None:
            asked.extend(part.cases(2))

        def make(self, processes: int) -> dict[Case, str]:
            return {}

    monkeypatch.setattr(result_cells, "ImageMaker", Maker)
    monkeypatch.setattr(
        result_cells, "make_rows", lambda part, *_: {case: cell(part, case).row for case in part.cases(2)}
    )
    measure(matrix, store, tmp_path, 60.0)
    assert asked == [cases_of(matrix)[3]]
    measure(matrix, store, tmp_path, 60.0)
    assert len(asked) == 1, "a row that is there is not measured again"


def test_a_failed_row_is_named_and_not_kept(store: CellStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Maker:
        def __init__(self, part: Matrix, cache: Any, jobs: Any) -> None:
            self.part = part

        def make(self, processes: int) -> dict[Case, str]:
            return {case: "rank 1 ended" for case in self.part.cases(2)}

    monkeypatch.setattr(result_cells, "ImageMaker", Maker)
    with pytest.raises(RuntimeError, match="tiny-sd outliers:32, dpm-solver:3, otil on 2 ranks: rank 1 ended"):
        measure(matrix_of(RUN), store, tmp_path, 60.0)
    assert not store.path.exists()


def test_a_page_keeps_what_stands_round_a_table(
    store: CellStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- few -->\n\nold\n\n<!-- end -->\n<!-- more -->\nother\n<!-- end -->\nafter\n")
    made = Table("page.md", (RUN,), equivalents)
    write("few", made, store)
    assert "old" in page.read_text(), "nothing was measured"
    matrix = matrix_of(RUN)
    for case, psnr in zip(cases_of(matrix)[:3], (45.0, 55.0, 45.0), strict=True):
        store.save(matrix, case, cell(matrix, case, psnr=psnr))
    write("few", made, store)
    text = page.read_text()
    assert text.startswith("before\n<!-- few -->\n\n    otil-xdit eval --models tiny-sd ")
    assert text.endswith("\n\n<!-- end -->\n<!-- more -->\nother\n<!-- end -->\nafter\n") and "old" not in text
    assert "2 images a row, measured on 2026-11-27 (abc1234). Empty cells were not measured." in text
    assert "| tiny-sd, 2 ranks | 55.0 (40.0) |  | 0.0 | 45.0 (40.0) | 10.0 |" in text


def test_margins_are_of_the_worst_equivalent(store: CellStore) -> None:
    matrix = matrix_of(RUN)
    figures = {"distrifusion": {"": 46.1, "outliers:32": 46.1}, "otil": {"": 58.3, "outliers:32": 57.9}}
    for case in cases_of(matrix):
        network = "" if case.equivalent is None else case.equivalent.text
        store.save(matrix, case, cell(matrix, case, psnr=figures[case.variant.text][network]))
    rows = [found.row for found in cells_of(matrix, store) if found.row.variant == "otil" or not found.row.network]
    assert equivalents(rows).splitlines()[-1].endswith("| 57.9 (40.0) | 0.4 | 46.1 (40.0) | 11.8 |")


def test_dates_have_their_commits() -> None:
    row = make_row(cases_of(matrix_of(RUN))[0], matrix_of(RUN), None, "")
    cells = [Cell(row, "b", "2026-11-27"), Cell(row, "a", "2026-11-26"), Cell(row, "", "2026-11-27")]
    assert when_measured(cells) == "on 2026-11-26 (a) and on 2026-11-27 (b, no commit)"


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_its_place_and_its_runs_are_understood(name: str) -> None:
    page = (RESULTS / TABLES[name].page).read_text()
    assert page.count(f"<!-- {name} -->\n") == 1
    assert all(cases_of(matrix_of(run)) for run in TABLES[name].runs)
