"""`otil-xdit bench`: what it refuses, its figures, the shaped link, a small run, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from tqdm import tqdm

from otil_xdit.catalog.folders import find_model
from otil_xdit.dryrun.networks import attention_layers, find_network
from otil_xdit.networks.dit.token_cut import TokenCut
from otil_xdit.tools import main as tools
from otil_xdit.tools.bench import link
from otil_xdit.tools.bench.calibrate import ShapedLink, fit
from otil_xdit.tools.bench.networks import wider
from otil_xdit.tools.bench.plan import Cell, Plan, parse_strategy
from otil_xdit.tools.bench.report import plot, table
from otil_xdit.tools.bench.results import Results, Run
from otil_xdit.tools.bench.runner import CellRunner
from otil_xdit.tools.bench.tasks import GatherTask, ImageTask
from otil_xdit.tools.common.jobs import JobFailed, jobs_of_a_run
from tests.tools.test_bench_link import namespaces_of, no_link

PATIENCE = 120.0  # seconds; a rank loads in 8 on an idle machine


def plan(*strategies: str, **changes: Any) -> Plan:
    known: dict[str, Any] = {"models": (find_model("tiny-sd"),), "strategies": tuple(map(parse_strategy, strategies))}
    return Plan(**{**known, **changes})


def test_cells_of_several_ranks_have_one_process_too() -> None:
    cells = list(plan("one-process", "otil", ranks=(1, 2, 4), sizes=(128, 256)).cells)
    assert [(cell.size, cell.ranks) for cell in cells] == [(128, 2), (128, 4), (256, 2), (256, 4)]
    alone = plan("one-process", "otil", ranks=(1,))
    (cell,) = alone.cells
    assert [strategy.text for strategy in alone.strategies_of(cell)] == ["one-process"]


def test_what_cannot_run_says_why() -> None:
    unet, dit = find_model("tiny-sd"), find_model("tiny-dit")
    assert parse_strategy("ring").obstacle(unet, 2, 15, 7.5) == "xDiT has it for DiTs only"
    assert parse_strategy("ring").obstacle(dit, 2, 15, 7.5) is None
    assert parse_strategy("cfg").obstacle(unet, 4, 15, 7.5) == "two passes have 2 ranks, not 4"
    assert parse_strategy("cfg").obstacle(unet, 2, 15, 1.0) == "without guidance there is only one pass"
    assert parse_strategy("otil").obstacle(unet, 4, 15, 1.0) is None
    halves = parse_strategy("hybridiff")
    assert halves.obstacle(unet, 4, 6, 7.5) is None
    assert halves.obstacle(unet, 3, 15, 7.5) == "--ranks 3: hybridiff has two halves of the ranks; give an even number"
    assert "window_steps is 5; in a run of 5 steps give at most 4" in (halves.obstacle(unet, 2, 5, 7.5) or "")
    assert "compare the predictions with and without the prompt" in (halves.obstacle(unet, 2, 15, 1.0) or "")
    plan("one-process", "hybridiff", ranks=(3,), sizes=(256,), steps=5, guidance=1.0)  # beside others it is left out


def test_degrees_multiply_to_the_ranks() -> None:
    assert parse_strategy("otil:ratio=1/2").degrees(4)["patch"] == 4
    assert parse_strategy("ulysses").degrees(4) == {"patch": 1, "cfg": 1, "ulysses": 4, "ring": 1, "pipefusion": 1}
    assert set(parse_strategy("one-process").degrees(4).values()) == {1}
    halves = parse_strategy("hybridiff").degrees(4)
    assert halves == {"patch": 2, "cfg": 2, "ulysses": 1, "ring": 1, "pipefusion": 1}


def test_patches_are_those_of_one_half() -> None:
    dit = {"models": (find_model("tiny-dit"),), "ranks": (8,), "sizes": (32,)}
    plan("hybridiff", **dit)  # 4 rows of tokens
    with pytest.raises(ValueError, match="--size 32 cannot be cut into 8 patches"):
        plan("otil", **dit)


def run_of(strategy: str, *rounds: list[list[float]]) -> Run:
    """A run whose ranks took these seconds for the steps: a list of rounds of ranks of steps."""
    run = Run(Cell(find_model("tiny-sd"), 1, 128, 2), parse_strategy(strategy))
    for ranks in rounds:
        report = {
            "waited_seconds": 1.0,
            "exchange_seconds": 3.0,
            "kv_bytes_per_step": 1500.0,
            "small_bytes_per_step": 0.0,
        }
        reports = [
            {**report, "output_bytes_per_step": 0.0, "waited_seconds": float(rank)} for rank in range(len(ranks))
        ]
        run.rounds.append(
            [
                {"step_seconds": steps, "cpu_step_seconds": [step / 2 for step in steps], "report": report}
                for steps, report in zip(ranks, reports, strict=True)
            ]
        )
    return run


def test_figures_are_of_the_slowest_rank_and_the_median_round() -> None:
    run = run_of("distrifusion:warmup_steps=1", [[3, 1, 2], [1, 2, 1]], [[9, 9, 9], [9, 9, 9]], [[4, 4, 4], [1, 1, 1]])
    assert run.seconds == [6, 27, 12] and run.step_seconds[0] == [3, 2, 2]
    assert run.waited_seconds == [0.5, 0.5, 0.5] and run.worked_seconds == [2.5, 2.5, 2.5]
    image, after = run.image(), run.after_warmup()
    assert (image.median, image.least, image.most) == (4, 2, 9)
    assert after is not None and (after.median, after.least, after.most) == (4, 2, 9)
    assert run.displaced() == after, "DistriFusion displaces every step after warm-up"
    cpu = run.steady_cpu()
    assert run.steady() == after and cpu is not None and (cpu.median, cpu.least, cpu.most) == (2, 1, 4.5)


def test_displaced_steps_are_told_from_the_schedule() -> None:
    steps = [100.0] * 8 + [1.0, 3.0]  # the first 8 of 10 wait for their payloads
    displaced, after = run_of("otil", [steps, steps]).displaced(), run_of("otil", [steps, steps]).after_warmup()
    assert displaced is not None and displaced.median == 2
    assert after is not None and after.median == (6 * 100 + 4) / 8
    assert run_of("sync", [steps, steps]).after_warmup() is None
    assert run_of("compact-1bit", [steps, steps]).displaced() is None
    assert run_of("one-process", [steps]).after_warmup() is None
    run = run_of("otil:window=auto", [steps, steps])
    assert run.report is not None
    run.report["window"] = [8, 9]
    window = run.displaced()
    assert window is not None and window.median == 1, "where the window was found"


def test_the_line_through_samples() -> None:
    sizes = (1 << 10, 1 << 14, 1 << 20)
    alpha, beta = fit([(size, 0.002 + size / 15e6) for size in sizes])
    assert alpha == pytest.approx(0.002) and beta == pytest.approx(15e6)
    alpha, beta = fit([(size, size / 15e6 * (1 + size / 1e7)) for size in sizes])  # an alpha below 0 would fit better
    assert alpha == 0 and beta == pytest.approx(15e6, rel=0.2)


def test_the_table_and_the_plot(tmp_path: Path) -> None:
    results = Results(
        plan("one-process", "otil", "ring"), "otil-xdit bench", ShapedLink("tbf", "ratio=2", 2e7, (), 1e-3, 15e6)
    )
    skipped = Run(run_of("ring").cell, parse_strategy("ring"), skipped="no such")
    results.runs = [run_of("one-process", [[0.2, 0.2]]), run_of("otil", [[0.1, 0.1], [0.05, 0.1]]), skipped]
    results.runs[1].rounds[-1][0]["report"]["window"] = [1, 2]
    text = table(results)
    assert "| one process | 1 | 200.0 (200.0, 200.0) | 1.00 |" in text
    assert "| otil | 2 | 100.0 (100.0, 100.0) | 2.00 |" in text and "| 1.5 | 0.0 | 0.0 |" in text
    assert "- ring: not run: no such" in text and "| ring" not in text
    assert "- otil: the window was steps 1 to 1, counted from 0.\n" in text
    assert "`--link ratio=2`" in text and "bytes / (15.00 MB/s)" in text and "no delay is emulated" in text
    plot(results, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_wider_networks() -> None:
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(find_model("tiny-sd").folder + "/unet"))
    wide = wider(unet, 2)
    assert list(wide.config.block_out_channels) == [64, 96, 128, 128] and wide.config.attention_head_dim == 2
    assert all(one.equal(other) for one, other in zip(wide.parameters(), wider(unet, 2).parameters(), strict=True)), (
        "the same weights on every rank"
    )
    sample, text = torch.zeros(1, 4, 16, 16), torch.zeros(1, 3, 64)
    assert wide(sample, 1, encoder_hidden_states=text).sample.shape == sample.shape
    folder = find_model("tiny-dit").folder + "/transformer"
    dit = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(folder))
    assert wider(dit, 3).inner_dim == 3 * dit.inner_dim


class FakeJobs:
    """Answers at once; `failing` cannot be loaded."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.asked, self.alive = failing, list[str](), set[str]()

    def start(self, name: str, task: ImageTask, ranks: int) -> Any:
        job = SimpleNamespace(name=task.strategy, log="log", ranks=ranks, memory=lambda: 1 << 30)
        if task.strategy in self.failing:
            raise JobFailed(job, "rank 0: no such thing")  # type: ignore[arg-type]  # a stand-in
        self.alive.add(job.name)
        return job

    def ask(self, job: Any) -> list[dict[str, Any]]:
        self.asked.append(job.name)
        return [{"step_seconds": [1.0], "cpu_step_seconds": None, "report": None}] * job.ranks

    def close(self, job: Any) -> None:
        self.alive.remove(job.name)


def turns(jobs: FakeJobs, *strategies: str) -> list[Run]:
    """The runs of a cell with 5 rounds after 1."""
    chosen = plan(*strategies, models=(find_model("tiny-dit"),), rounds=5)
    runs = CellRunner(chosen, next(iter(chosen.cells)), jobs, tqdm(total=99, disable=True)).run()  # type: ignore[arg-type]
    assert not jobs.alive
    return runs


def test_every_strategy_has_a_turn_in_every_round() -> None:
    jobs = FakeJobs("ring")
    runs = turns(jobs, "one-process", "sync", "ring", "otil")
    assert [len(run.seconds) for run in runs] == [5, 5, 0, 5], "the warm-up round does not count"
    assert runs[2].skipped == "rank 0: no such thing" and not any(run.alternation for run in runs)
    assert jobs.asked[:3] == ["one-process", "sync", "otil"], "warm-up"
    rounds = [tuple(jobs.asked[start : start + 3]) for start in range(3, 18, 3)]
    assert len(jobs.asked) == 18 and all(len(set(order)) == 3 for order in rounds) and len(set(rounds)) > 1
    with pytest.raises(JobFailed, match="no such thing"):
        turns(FakeJobs("otil"), "one-process", "otil")


def test_what_memory_does_not_hold_takes_turns_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 << 30))
    runs = turns(FakeJobs(), "sync", "otil")
    assert [run.alternation for run in runs] == [0, 1] and [len(run.seconds) for run in runs] == [5, 5]
    results = Results(plan("sync", "otil"), "", runs=runs)
    assert "- Not all fitted into memory at once: otil took turns after the others were done." in table(results)


def test_two_strategies_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strategies = "one-process distrifusion:warmup_steps=1 hybridiff:window=1:2 ring"
    job = f"--strategies {strategies} --steps 2 --rounds 2 --warmup_rounds 0 --limit 120"
    assert tools.main(["bench", *job.split(), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["link"] is None and found["machine"]["cores"] >= 1 and "torch" in found["versions"]
    alone, shared, halves, skipped = found["runs"]
    assert alone["strategy"] == "one process" and alone["ranks"] == 1 and alone["report"] is None
    assert skipped["skipped"] == "xDiT has it for DiTs only" and skipped["seconds"] == []
    assert (shared["ranks"], shared["latent"], shared["degrees"]["patch"]) == (2, [32, 32], 2)
    assert shared["settings"]["warmup_steps"] == 1 and len(shared["waited_seconds"]) == 2
    assert (halves["degrees"]["cfg"], halves["degrees"]["patch"], halves["report"]["window"]) == (2, 1, [1, 2])
    first, staged = halves["report"]["discrepancy"]
    assert first > 0 and staged is None and all(step > 0 for step in shared["report"]["discrepancy"])
    for run in (alone, shared, halves):
        cpu = [sum(steps) for steps in run["cpu_step_seconds"]]
        assert all(0 < computed < 2 * total for computed, total in zip(cpu, run["seconds"], strict=True))
        assert len(run["seconds"]) == 2 and [len(steps) for steps in run["step_seconds"]] == [2, 2]
        assert all(
            0 < total <= sum(steps) + 1e-9 for total, steps in zip(run["seconds"], run["step_seconds"], strict=True)
        )
    layers = attention_layers(find_network("tiny-sd"), 128, 128, TokenCut(2), 0)
    expected = sum(2 * 2 * layer.tokens * layer.width * 4 for layer in layers)
    assert shared["report"]["kv_bytes_per_step"] == shared["report"]["sent_bytes"]["kv"]["steady"] == expected
    assert [sent["kv"] for sent in shared["rank_bytes"]] == [expected, expected] and alone["rank_bytes"] is None
    assert (tmp_path / "table.md").read_text().strip() == capsys.readouterr().out.strip()
    assert (tmp_path / "bench.png").is_file()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A bench whose two ranks have been started, over a shaped link where one can be made."""
    command = [sys.executable, "-m", "otil_xdit.tools.main", "bench", "--strategies", "sync", "--out", str(tmp_path)]
    command += ["--limit", "8", *([] if no_link() else ["--link", "100MB/s"])]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: len(ranks_of(process)) == 2)
            yield process
        finally:
            process.kill()


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Its ranks; the commands that make the link are children too, and may be gone when they are asked."""
    found = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child] if "otil_xdit.tools.common.worker" in child.cmdline() else []
    return found


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs or could run on; a process that nobody has waited for yet has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_for(done: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "to_rank", "code", "message"),
    [
        (signal.SIGKILL, True, 1, ": rank 1 ended, exit code -9; see "),
        (signal.SIGSTOP, True, 1, " within 8 s; see "),
        (signal.SIGTERM, False, 143, "otil-xdit bench: SIGTERM, all processes stopped"),
        (signal.SIGKILL, False, -9, ""),
    ],
    ids=["killed rank", "stuck rank", "terminated bench", "killed bench"],
)
def test_nothing_is_left_behind(
    bench: subprocess.Popen[str], number: int, to_rank: bool, code: int, message: str
) -> None:
    ranks = ranks_of(bench)
    os.kill(ranks[1].pid if to_rank else bench.pid, number)
    errors = bench.communicate(timeout=PATIENCE)[1]
    assert bench.returncode == code, errors
    assert message in errors and "Traceback" not in errors
    wait_for(lambda: not any(is_alive(rank) for rank in ranks))
    if code == -signal.SIGKILL and not no_link():
        link.remove_stale(link.run_command)  # as the next bench does
    assert not namespaces_of(bench.pid)


def test_ranks_are_stopped_between_two_questions(tmp_path: Path) -> None:
    with jobs_of_a_run(tmp_path / "logs", PATIENCE, []) as jobs:
        job = jobs.start("gathers", GatherTask((8, 64), 3), 2)
        ranks = [psutil.Process(process.pid) for process in job.processes]
        for _ in range(2):
            wait_for(lambda: {rank.status() for rank in ranks} == {psutil.STATUS_STOPPED})
            answers = jobs.ask(job)
            assert [[len(seconds) for seconds in answer["seconds"]] for answer in answers] == [[3, 3], [3, 3]]
    assert not any(rank.is_running() for rank in ranks)
