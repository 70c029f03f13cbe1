"""`otil-xdit eval`: what it takes and refuses, what it keeps, and runs on two ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from otil_xdit.catalog.folders import find_model, load_pipe
from otil_xdit.method.config import OtilConfig
from otil_xdit.tools import main as tools
from otil_xdit.tools.common import jobs as jobs_module
from otil_xdit.tools.common.jobs import JobFailed, Jobs, jobs_of_a_run
from otil_xdit.tools.common.variants import parse_variant
from otil_xdit.tools.common.worker import last_line
from otil_xdit.tools.eval import cache as images
from otil_xdit.tools.eval import cli as tool
from otil_xdit.tools.eval import metrics
from otil_xdit.tools.eval.cache import DrawnImage, ImageCache, load_image
from otil_xdit.tools.eval.generate import Failures, ImageMaker
from otil_xdit.tools.eval.matrix import REORDERED, Call, Case, Matrix, Sampler, parse_sampler
from otil_xdit.tools.eval.tasks import PipelineTask, Question


@pytest.mark.usefixtures("no_start")
def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(tool.EXTRAS, "no_such_module", "no-such-package")
    with pytest.raises(SystemExit):
        tools.main(["eval"])
    assert "no-such-package not installed; pip install 'otil-xdit[metrics,bench]'" in capsys.readouterr().err


@pytest.mark.usefixtures("no_start")
def test_a_dry_run_lists_the_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = "eval --dry_run --models tiny-sd tiny-dit --presets naive --ranks 2 4 --samplers ddim:9 own:9 --seeds 3 --out"
    assert tools.main([*job.split(), str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "9 cases, 54 images"  # 3 model-sampler pairs, each once alone and on 2 and 4 ranks; 2 x 3
    assert "tiny-dit, own:9, naive on 4 ranks: 6" in lines and not any("tiny-dit, ddim" in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_a_variant_is_a_preset_with_settings() -> None:
    variant = parse_variant("otil:ratio=1/4, select=kv-l2,warmup_steps=1")
    assert variant.config == OtilConfig(ratio=0.25, select="kv-l2", warmup_steps=1)
    assert variant.preset == "otil" and variant.settings["ratio"] == 0.25
    assert parse_variant("sync").config.freshness == "sync"
    assert parse_sampler("dpm-solver:15") == Sampler("dpm-solver", 15)


def matrix(**changes: Any) -> Matrix:
    known: dict[str, Any] = {
        "models": (find_model("tiny-sd"),),
        "variants": (parse_variant("otil:ratio=1/8"),),
        "ranks": (2,),
        "samplers": (Sampler("ddim", 3),),
        "calls": (Call("a circle", 0), Call("a circle", 1)),
    }
    return Matrix(**{**known, **changes})


def test_a_key_changes_with_all_that_determines_a_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, call = matrix(), Call("a circle", 0)
    case = base.cases(2)[0]

    def key(matrix: Matrix = base, case: Case = case, call: Call = call) -> str:
        return ImageCache(tmp_path, matrix).key(case, call)

    keys = [
        key(),
        key(case=case.reference),
        key(case=replace(case, ranks=4)),
        key(case=replace(case, sampler=Sampler("ddim", 4))),
        key(case=replace(case, sampler=Sampler("euler", 3))),
        key(case=replace(case, variant=parse_variant("otil:ratio=1/4"))),
        key(case=replace(case, variant=parse_variant("sync"))),
        key(case=replace(case, model=find_model("tiny-sdxl"))),
        key(call=Call("a square", 0)),
        key(call=Call("a circle", 1)),
        key(matrix(guidance=5.0)),
        key(matrix(size=64)),
        key(matrix(lora=__file__)),
        key(matrix(dtype=torch.bfloat16)),
        key(case=replace(case, cfg_parallel=True)),
        key(case=replace(case.reference, equivalent=REORDERED)),
    ]
    assert len(set(keys)) == len(keys)
    assert key(case=replace(case, variant=parse_variant("otil:ratio=0.125"))) == keys[0], "the same settings"
    assert key(case=replace(case, variant=parse_variant("otil:ratio=1/8,timeout=9"))) == keys[0], (
        "a timeout draws nothing"
    )
    monkeypatch.setattr(images, "code_fingerprint", lambda names=(): "callers" if names else "changed")
    changed = key(case=case.reference)
    monkeypatch.setattr(images, "code_fingerprint", lambda names=(): "callers")
    assert key(case=case.reference) == changed, "the plugin's code does not draw one process's image"
    assert key() not in keys


def test_changed_weights_change_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"1")
    before = images.fingerprint(str(tmp_path))
    images.fingerprint.cache_clear()
    (tmp_path / "weights").write_bytes(b"12")
    assert images.fingerprint(str(tmp_path)) != before


def test_a_image_comes_back_as_it_was(tmp_path: Path) -> None:
    drawn = DrawnImage(torch.rand(3, 8, 8), {"sent_bytes": {"kv": {"warmup": 3, "steady": 4}}}, 0.5)
    cache, (case,), call = (
        ImageCache(tmp_path, matrix(calls=(Call("a circle", 0),))),
        matrix().cases(2),
        Call("a circle", 0),
    )
    assert cache.missing(case) == [call]
    cache.save(case, call, drawn)
    assert list(tmp_path.iterdir()) == [cache.path(case, call)] and not cache.missing(case)
    (found,) = cache.load(case)
    assert torch.equal(found.image, drawn.image)
    assert (found.report, found.seconds) == (drawn.report, drawn.seconds)


@pytest.mark.slow
def test_a_small_run_on_two_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One variant fails and the others are reported; what is made is not made again."""
    run = ["eval", "--models", "tiny-dit", "--samplers", "own:3", "--prompts", "1", "--out", str(tmp_path), "--presets"]
    assert tools.main([*run, "sync", "naive", "otil:timeout=0.001"]) == 1
    shown = capsys.readouterr()
    assert shown.out == (tmp_path / "table.md").read_text() + "\n"
    rows = {row["variant"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    sync, failed, naive = rows["sync"], rows["otil:timeout=0.001"], rows["naive"]
    assert sync["psnr"] > 80 > naive["psnr"] and sync["seam"] == pytest.approx(1.0, abs=0.01)
    assert failed["psnr"] is None and "ExchangeTimeout" in failed["error"] and failed["error"] in shown.err
    assert sync["kv_total"] == pytest.approx(3 * sync["kv_bytes"]) and naive["kv_bytes"] == 0
    assert naive["kv_total"] == pytest.approx(2 * sync["kv_bytes"]), "two warm-up steps"
    assert {path.name for path in tmp_path.glob("*.png")} == {"psnr_bytes.png", "sheet-tiny-dit-2-own-3.png"}

    def fail(*args: object, **kwargs: object) -> int:
        raise AssertionError("started")

    monkeypatch.setattr(Jobs, "start", fail)
    assert tools.main([*run, "sync", "naive"]) == 0
    again = {row["variant"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert {name: row["psnr"] for name, row in again.items()} == {"sync": sync["psnr"], "naive": naive["psnr"]}
    with pytest.raises(AssertionError, match="started"):
        tools.main([*run, "sync", "naive", "--fresh"])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "part"), [("tiny-sd", "unet"), ("tiny-dit", "transformer")])
def test_a_lora_is_in_every_image(model: str, part: str, tmp_path: Path) -> None:
    pipe = load_pipe(find_model(model).folder, "own", None)
    layers = ["to_q", "to_k", "to_v"]
    getattr(pipe, part).add_adapter(LoraConfig(target_modules=layers, init_lora_weights=False))
    weights = get_peft_model_state_dict(getattr(pipe, part))
    type(pipe).save_lora_weights(tmp_path / "lora", **{f"{part}_lora_layers": weights})
    run = ["eval", "--models", model, "--samplers", "own:3", "--prompts", "1", "--presets", "sync", "--out"]
    assert tools.main([*run, str(tmp_path / "with"), "--lora", str(tmp_path / "lora")]) == 0
    assert tools.main([*run, str(tmp_path / "without")]) == 0
    (made,) = json.loads((tmp_path / "with" / "rows.json").read_text())
    assert made["psnr"] > 80
    found = [load_image(path).image for name in ("with", "without") for path in (tmp_path / name / "cache").iterdir()]
    assert metrics.psnr(found[0], found[2]) < 40, "the LoRA changes nothing"


class FakeJobs:
    """Answers at once; an image of `failing` fails. `launched` has the variants that each job was asked for."""

    def __init__(self, failing: str | None = "") -> None:
        self.failing, self.launched, self.alive = failing, list[list[str | None]](), 0
        self.asked: list[list[Question]] = []

    def start(self, name: str, task: PipelineTask, ranks: int) -> Any:
        self.launched.append([])
        self.alive += 1
        return SimpleNamespace(name=name, log="log", ranks=ranks)

    def ask(self, job: Any, questions: list[Question]) -> list[dict[str, Any]]:
        assert 0 < len(questions) <= job.ranks
        self.asked.append(questions)
        variant = questions[0].pipeline.variant
        self.launched[-1] += [] if variant in self.launched[-1] else [variant]
        if variant == self.failing:
            raise JobFailed(job, "rank 1: Error: 1")
        has_image = [variant is None or rank == job.ranks - 1 for rank in range(len(questions))]
        made = {"image": torch.zeros(3, 1, 1).numpy(), "report": None, "seconds": 0.0}
        return [dict(made) if has else {} for has in has_image] + [{}] * (job.ranks - len(questions))

    def close(self, job: Any) -> None:
        self.alive -= 1


def make(matrix: Matrix, cache: ImageCache, jobs: FakeJobs, processes: int = 1) -> Failures:
    """What could not be made."""
    failures = ImageMaker(matrix, cache, jobs).make(processes)  # type: ignore[arg-type]  # a stand-in
    assert not jobs.alive
    return failures


def test_a_failure_costs_one_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = FakeJobs("naive")
    three = matrix(variants=tuple(parse_variant(name) for name in ("otil", "naive", "sync")))
    known = ImageCache(tmp_path, three)
    assert make(three, known, jobs) == {three.cases(2)[1]: "rank 1: Error: 1"}
    assert jobs.launched == [[None], ["otil", "naive"], ["sync"]]
    assert [len(known.missing(case)) for case in three.cases(2)] == [0, 2, 0]
    said = "tiny-sd, ddim:3, naive on 2 ranks failed: rank 1: Error: 1; all it wrote is in log"
    assert f"otil-xdit eval: {said}\n" in capsys.readouterr().err


def test_variants_with_other_patches_have_ranks_of_their_own(tmp_path: Path) -> None:
    jobs = FakeJobs()
    names = ("otil", "hybridiff:window=1:2", "sync", "hybridiff:window=2:3")
    three = matrix(variants=tuple(map(parse_variant, names)), ranks=(4,))
    assert make(three, ImageCache(tmp_path, three), jobs) == {}
    assert jobs.launched == [[None], [names[0], names[2]], [names[1], names[3]]]
    assert [case.patches for case in three.cases(4)] == [4, 2, 4, 2]


def test_in_16_bits_one_process_draws_with_sums_in_another_order_too(tmp_path: Path) -> None:
    jobs, low = FakeJobs(), matrix(dtype=torch.bfloat16, calls=(Call("a circle", 0),), cfg_parallel=True, ranks=(4,))
    assert make(low, ImageCache(tmp_path, low), jobs) == {}
    asked = [(one.variant, one.equivalent, one.dtype, one.cfg_parallel) for (one, *_) in map(specs, jobs.asked)]
    known = [(None, None), (None, "reordered:0"), ("otil:ratio=1/8", None)]
    assert asked == [(*pair, torch.bfloat16, pair[0] is not None) for pair in known]
    assert [case.patches for case in low.cases(4)] == [2] and not matrix().floors(4)
    (floor,) = low.floors(4)
    assert floor.ranks == 4 and not ImageCache(tmp_path, low).missing(floor)


def test_no_floor_without_what_it_is_compared_with(tmp_path: Path) -> None:
    low = matrix(dtype=torch.float16)
    failures = make(low, ImageCache(tmp_path, low), FakeJobs(failing=None))
    assert failures[low.floors(2)[0]] == "rank 1: Error: 1"


def specs(questions: list[Question]) -> list[Any]:
    return [question.pipeline for question in questions]


def test_one_processs_images_are_shared_out(tmp_path: Path) -> None:
    jobs, calls = FakeJobs(), tuple(Call("a circle", seed) for seed in range(3))
    both = matrix(calls=calls)
    assert make(both, ImageCache(tmp_path, both), jobs, processes=2) == {}
    alone = [[question.seed for question in asked] for asked in jobs.asked if asked[0].pipeline.variant is None]
    together = [[question.seed for question in asked] for asked in jobs.asked if asked[0].pipeline.variant is not None]
    assert alone == [[0, 1], [2]] and together == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.slow
def test_two_halves_and_patches_on_two_ranks(tmp_path: Path) -> None:
    run = ["eval", "--models", "tiny-dit", "--samplers", "own:8", "--prompts", "1", "--out", str(tmp_path), "--presets"]
    assert tools.main([*run, "sync", "hybridiff:window_steps=0", "hybridiff:window=5:7", "otil:window=auto"]) == 0
    rows = {row["variant"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["sync"]["psnr"] > 80 and rows["hybridiff:window_steps=0"]["psnr"] > 80
    assert rows["hybridiff:window_steps=0"]["seam"] is None and rows["hybridiff:window=5:7"]["windows"] == [[5, 7]]
    assert rows["hybridiff:window=5:7"]["discrepancies"][0][5:7] == [None, None]
    assert rows["otil:window=auto"]["windows"] == [[3, 8]]


def test_variants_with_the_same_settings_are_made_once(tmp_path: Path) -> None:
    jobs = FakeJobs()
    twice = matrix(variants=(parse_variant("otil:ratio=1/8"), parse_variant("otil:ratio=0.125")))
    assert make(twice, ImageCache(tmp_path, twice), jobs) == {}
    assert jobs.launched == [[None], ["otil:ratio=1/8"]] and len(jobs.asked) == 2 + 2


def test_an_error_is_one_line() -> None:
    def fail(error: Exception) -> str:
        try:
            raise error
        except Exception as raised:
            return last_line(raised)

    assert fail(ValueError("first\nlast\n")) == "ValueError: last"
    assert fail(AssertionError()) == "AssertionError: test_eval.py: raise error"


def test_stuck_ranks_are_ended_and_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(jobs_module, "WORKER", "sleeper")
    only = matrix(calls=(Call("a circle", 0),))
    with jobs_of_a_run(tmp_path / "logs", 3.0, []) as jobs:
        failures = ImageMaker(only, ImageCache(tmp_path / "cache", only), jobs).make(1)
    assert [str(case) for case in failures] == [
        "tiny-sd, ddim:3, one process",
        "tiny-sd, ddim:3, otil:ratio=1/8 on 2 ranks",
    ]
    alone, together = failures.values()
    assert alone == "rank 0 did not start within 3 s"
    assert together == f"no image of one process to compare with ({alone})"
