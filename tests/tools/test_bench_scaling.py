"""Time and bytes over the number of ranks and over the size of the latent, and the ratio that a slow link reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from otil_xdit.catalog.folders import find_model
from otil_xdit.tools.bench import scaling
from otil_xdit.tools.bench.calibrate import ShapedLink
from otil_xdit.tools.bench.cli import write
from otil_xdit.tools.bench.plan import Cell, Plan, parse_strategy
from otil_xdit.tools.bench.report import table
from otil_xdit.tools.bench.results import Results, Run, Spread

MODELS = find_model("tiny-sd"), find_model("tiny-dit")


def plan(*strategies: str, **changes: Any) -> Plan:
    known: dict[str, Any] = {"models": MODELS[:1], "strategies": tuple(map(parse_strategy, strategies))}
    return Plan(**{**known, **changes})


def run_of(strategy: str, ranks: int, latent: int, *seconds: float, kv: float = 0.0) -> Run:
    """A run of one round; rank r sends r kB more than rank 0, and computes half of the time."""
    chosen = parse_strategy(strategy)
    run = Run(Cell(MODELS[0], 1, latent * MODELS[0].vae, ranks), chosen)
    report = {"waited_seconds": 0.0, "exchange_seconds": 0.0, "small_bytes_per_step": 0.0, "output_bytes_per_step": 0.0}
    report |= {"warmup_steps": 2, "sent_bytes": {"kv": {"warmup": 2e6, "steady": 0}}}
    run.rounds.append(
        [
            {
                "step_seconds": list(seconds),
                "cpu_step_seconds": [second / 2 for second in seconds],
                "report": None if strategy == "one-process" else {**report, "kv_bytes_per_step": kv + 1e3 * rank},
            }
            for rank in range(run.ranks)
        ]
    )
    return run


def test_latents_are_pixels_of_each_models_vae() -> None:
    chosen = plan("otil", models=MODELS, latents=(32, 64))
    assert [cell.latent for cell in chosen.cells] == [(32, 32), (64, 64)] * 2
    with pytest.raises(ValueError, match="--latent 0: give a whole number from 1 up"):
        plan("otil", latents=(0,))


def test_points_are_of_the_busiest_rank_after_warmup() -> None:
    runs = [run_of("naive", 2, 32, 9, 9, 2, 4), run_of("naive", 4, 32, 9, 9, 6, 6, kv=5e3)]
    runs += [Run(runs[0].cell, parse_strategy("ring"), skipped="no such")]
    wall, cpu, kv, _ = (scaling.points(runs, lambda run: run.ranks, figure) for figure in scaling.PANELS.values())
    assert wall == {"naive": {2: Spread(3e3, 3e3, 3e3), 4: Spread(6e3, 6e3, 6e3)}}
    assert cpu["naive"][4].median == 3e3 and [kv["naive"][ranks].median for ranks in (2, 4)] == [1.0, 8.0]


def test_strategies_without_a_step_left_or_without_counters_have_no_point() -> None:
    runs = [run_of("distrifusion", 2, 32, 1, 1, 1, 1), run_of("one-process", 2, 32, 1, 1, 1, 1)]
    found = [scaling.points(runs, lambda run: run.ranks, figure) for figure in scaling.PANELS.values()]
    assert [list(points) for points in found] == [["one process"], ["one process"], ["distrifusion"], ["distrifusion"]]
    assert list(found[0]["one process"]) == [1]


def test_plots_are_written_where_there_is_something_to_compare(tmp_path: Path) -> None:
    def written(*cells: tuple[int, int]) -> list[str]:
        results = Results(plan("one-process", "naive"), "otil-xdit bench")
        for ranks, latent in cells:
            results.runs += [
                run_of(name, ranks, latent, 1.0, 1.0, 0.5 * latent) for name in ("one-process", "naive", "sync")
            ]
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write(results, folder)
        assert all(path.stat().st_size > 10_000 for path in folder.glob("*.png"))
        return sorted(path.name for path in folder.iterdir())

    always = ["bench.json", "bench.png", "table.md"]
    assert written((2, 32)) == always
    assert written((2, 32), (4, 32)) == [*always[:2], "ranks.png", "table.md"]
    assert written((2, 32), (2, 64)) == [*always[:2], "latents.png", "table.md"]


def test_the_ratio_that_was_reached_is_printed() -> None:
    results = Results(plan("naive"), "otil-xdit bench", ShapedLink("tbf", "ratio=2", 2e7, (), 1e-3, 1e6, ratio=1.9))
    assert "Ratio reached: 1.90 by the naive images before the run.\n" in table(results)
    results.runs = [run_of("naive", 2, 32, 9, 9, 0.5, 0.5)]
    assert "before the run, 2.00 by naive's steps after warm-up in the run.\n" in table(results)
    results.link = ShapedLink("tbf", "1gbit", 2e7, (), 1e-3, 1e6)
    assert "Ratio" not in table(results)
