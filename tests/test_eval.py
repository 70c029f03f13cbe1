"""`otil-xdit eval`: what it takes and refuses, what it measures, what it writes, and a small run on two ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from otil_xdit.config import OtilConfig
from otil_xdit.evaluation import generate, metrics, store, weights
from otil_xdit.evaluation.matrix import Call, Case, Matrix, Sampler, parse_sampler, parse_variant
from otil_xdit.evaluation.models import find_model, load_pipe
from otil_xdit.evaluation.report import plot, table
from otil_xdit.evaluation.rows import Row, as_json, with_figures, with_shares
from otil_xdit.evaluation.sheets import AMPLIFIED, Column, difference, sheet
from otil_xdit.evaluation.store import Picture, Store, load_picture, save_picture
from otil_xdit.evaluation.worker import last_line
from otil_xdit.tools import eval as tool
from otil_xdit.tools import main as tools

REFUSED = {
    "model": ("--models tiny-sdd", "--models tiny-sdd: no such model; choose from tiny-sd, tiny-sdxl, tiny-dit"),
    "preset": ("--presets oti", "--presets oti: 'oti' is not a preset; choose from otil, "),
    "setting": ("--presets otil:ration=1", "'ration=1' is not setting=value; settings are "),
    "value": ("--presets otil:ratio=2", "--presets otil:ratio=2: ratio=2: ratio is 2; give a number in (0, 1]"),
    "choice": ("--presets otil:select=best", "select is 'best'; choose from latent-cosine"),
    "number": ("--presets otil:polling=half", "--presets otil:polling=half: polling=half: could not convert"),
    "block": ("--presets otil:block=20", "block 20 is larger than a patch"),
    "sampler": ("--samplers dpm:15", "--samplers dpm:15: 'dpm' is not a sampler; choose from own, ddim"),
    "steps": ("--samplers ddim", "--samplers ddim: give the number of steps after a colon, say ddim:15"),
    "sampler of a DiT": (
        "--models tiny-dit --samplers ddim:9",
        "tiny-dit is a DiT and has its own only; add own:STEPS",
    ),
    "one rank": ("--ranks 1", "--ranks 1: give 2 or more"),
    "rows": ("--ranks 5", "cannot be cut into 5 patches"),
    "rows of a DiT": ("--models tiny-dit --samplers own:9 --ranks 3", "--size 128 cannot be cut into 3 patches"),
    "size": ("--size 100", "--size 100 is not possible with tiny-sd; give a multiple of 8"),
    "guidance": ("--models tiny-dit --samplers own:9 --guidance 1", "--guidance 1: xDiT's SD3 pipeline needs guidance"),
    "halves": (
        "--ranks 3 --presets hybridiff",
        "--ranks 3: hybridiff has two halves of the ranks; give an even number",
    ),
    "window": ("--presets hybridiff:window=12:20", "window is '12:20', which a run of 15 steps has no room for"),
    "guidance of a window": ("--presets otil:window=auto --guidance 1", "--guidance 1 with otil:window=auto: "),
    "prompts": ("--prompts 9", "--prompts 9: there are 8; give 1 to 8"),
    "prompt file": ("--prompt_file none.txt", "--prompt_file none.txt: No such file"),
    "seeds": ("--seeds 0", "--seeds 0: give a whole number from 1 up"),
    "jobs": ("--jobs 0", "--jobs 0: give a whole number from 1 up"),
    "timeout": ("--timeout 0", "--timeout 0: give a number of seconds above 0"),
    "LoRA": ("--lora none", "--lora none: give a file of LoRA weights"),
    "LoRA for two": ("--lora otil_xdit/models/tiny-sd-lora --models tiny-sd tiny-sdxl", "--lora fits one architecture"),
}


@pytest.mark.usefixtures("cpu_machine", "no_start")
@pytest.mark.parametrize(("line", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_anything_starts(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        tools.main(["eval", "--out", str(out), *line.split()])
    assert ended.value.code == 2 and not out.exists()
    assert message in capsys.readouterr().err


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
    assert lines[-1] == "9 cases, 54 pictures"  # 3 model-sampler pairs, each once alone and on 2 and 4 ranks; 2 x 3
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


def test_a_key_changes_with_all_that_determines_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, call = matrix(), Call("a circle", 0)
    case = base.cases(2)[0]

    def key(matrix: Matrix = base, case: Case = case, call: Call = call) -> str:
        return Store(tmp_path, matrix).key(case, call)

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
    ]
    assert len(set(keys)) == len(keys)
    assert key(case=replace(case, variant=parse_variant("otil:ratio=0.125"))) == keys[0], "the same settings"
    assert key(case=replace(case, variant=parse_variant("otil:ratio=1/8,timeout=9"))) == keys[0], (
        "a timeout draws nothing"
    )
    monkeypatch.setattr(store, "code_fingerprint", lambda names=(): "callers" if names else "changed")
    changed = key(case=case.reference)
    monkeypatch.setattr(store, "code_fingerprint", lambda names=(): "callers")
    assert key(case=case.reference) == changed, "the plugin's code does not draw one process's picture"
    assert key() not in keys


def test_changed_weights_change_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"1")
    before = store.fingerprint(str(tmp_path))
    store.fingerprint.cache_clear()
    (tmp_path / "weights").write_bytes(b"12")
    assert store.fingerprint(str(tmp_path)) != before


def test_a_picture_comes_back_as_it_was(tmp_path: Path) -> None:
    picture = Picture(torch.rand(3, 8, 8), {"sent_bytes": {"kv": 7}}, 0.5)
    save_picture(tmp_path, "name", picture)
    (path,) = tmp_path.iterdir()
    found = load_picture(path)
    assert torch.equal(found.image, picture.image)
    assert (found.report, found.seconds) == (picture.report, picture.seconds)


def test_psnr_of_a_known_error() -> None:
    black = torch.zeros(3, 16, 16)
    assert metrics.psnr(black + 0.1, black) == pytest.approx(20.0, abs=1e-4)  # -20 log10 0.1
    assert metrics.psnr(black, black) == metrics.IDENTICAL
    assert metrics.ssim(black, black) == pytest.approx(1.0)
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert metrics.ssim(picture, 1 - picture) < 0


def test_a_seam_is_a_step_at_the_border() -> None:
    smooth = (torch.arange(32) / 62).reshape(1, 32, 1).expand(3, 32, 8).clone()
    step = smooth.clone()
    step[:, 16:] += 1 / 62  # twice as steep there, and only there
    assert metrics.steepness(smooth, [16]) == pytest.approx(1.0, abs=1e-5)
    assert metrics.seam(smooth, smooth, [16]) == 1.0
    assert metrics.seam(step, smooth, [16]) == pytest.approx(
        (2 / 62 + metrics.FLOOR) / (1 / 62 + metrics.FLOOR), rel=1e-4
    )
    assert metrics.seam(step, smooth, [8]) == pytest.approx(1.0, abs=1e-5), "a step elsewhere is no seam"
    assert metrics.steepness(torch.full((3, 32, 8), 0.5), [16]) == 1.0, "flat"
    # The first row pair that counts beside the border 3 of [1, 3] lies between rows 3 and 4: both borders are left out.
    narrow = torch.zeros(3, 8, 4)
    narrow[:, 1:3] = 1.0
    assert metrics.steepness(narrow, [1, 3]) == pytest.approx((1 + metrics.FLOOR) / metrics.FLOOR, rel=1e-4)


def test_borders_are_where_the_pictures_are_cut() -> None:
    assert find_model("tiny-dit").borders(128, 4) == (32, 64, 96)
    assert find_model("tiny-sd").borders(128, 2) == (64,)
    assert find_model("tiny-sd").borders(128, 3) == (64, 96)  # 4 rows at the lowest resolution: 2, 1, 1


def pictures(offset: float, sent: dict[str, int]) -> Picture:
    report = {"kv_bytes_per_step": sent["kv"] / 2, "small_bytes_per_step": 10.0, "sent_bytes": sent}
    return Picture(torch.full((3, 16, 16), 0.5 + offset), report, 2.0)


ROW = Row("tiny-sd", "otil", "otil", 2, "ddim", 4)


def test_a_row_is_the_mean_over_its_pictures() -> None:
    best = [Picture(torch.full((3, 16, 16), 0.5), None, 1.0)] * 2
    sent = {"kv": 100, "kv-warmup": 900, "halo": 7, "moments-warmup": 7}
    row = with_figures(ROW, [pictures(0.1, sent), pictures(0.01, sent)], best, [8])
    assert (row.psnr, row.psnr_min, row.psnr_std) == pytest.approx((30.0, 20.0, 10.0), abs=1e-2)
    assert (row.kv_bytes, row.small_bytes, row.kv_total, row.kv_range) == (50.0, 10.0, 1000.0, None)
    assert (row.pictures, row.seconds, row.seam) == (2, 2.0, pytest.approx(1.0))
    odd = with_figures(ROW, [pictures(0.1, sent), pictures(0.1, {**sent, "kv": 300})], best, [8])
    assert odd.kv_range == (1000, 1200) and "1.0 to 1.2 kB" in table([odd], "", [])


def test_one_patch_has_no_seam() -> None:
    best = [Picture(torch.full((3, 16, 16), 0.5), None, 1.0)]
    seen = {"window": (4, 9), "discrepancy": [0.5, None]}
    made = pictures(0.1, {"kv": 0})
    row = with_figures(ROW, [replace(made, report={**made.report, **seen})], best, [])
    assert row.seam is None and row.psnr == pytest.approx(20.0, abs=1e-2)
    assert (row.windows, row.discrepancies) == (((4, 9),), ([0.5, None],))


def made_up_rows() -> list[Row]:
    figures = {"pictures": 2, "psnr_std": 0.5, "ssim": 0.98, "seam": 1.04, "small_bytes": 300.0, "seconds": 1.0}
    rows = [
        replace(ROW, variant="distrifusion", preset="distrifusion", kv_bytes=8e3, kv_total=80e3, psnr=39.0),
        replace(ROW, kv_bytes=1e3, kv_total=24e3, psnr=35.0, psnrs=(34.0, 36.0)),
        replace(ROW, variant="otil:ratio=1/4", kv_bytes=2e3, kv_total=32e3, psnr=37.0),
        replace(ROW, variant="naive", preset="naive", kv_bytes=0.0, kv_total=16e3, psnr=28.0),
        replace(ROW, variant="sync", preset="sync", kv_bytes=8e3, kv_total=80e3, psnr=130.0),
        replace(ROW, variant="sync", preset="sync", ranks=4, kv_bytes=8e3, kv_total=80e3, psnr=130.0),
    ]
    done = [replace(row, psnr_min=(row.psnr or 0) - 1, **figures) for row in rows]  # type: ignore[arg-type]  # many kinds
    return [*done, replace(ROW, variant="otil:block=3", error="rank 1: ValueError: a | b")]


def test_shares_are_of_distrifusion_in_the_same_place() -> None:
    rows = with_shares(made_up_rows())
    assert [row.kv_share for row in rows] == [1.0, 1 / 8, 1 / 4, 0.0, 1.0, None, None]
    assert [row.total_share for row in rows[:3]] == [1.0, 0.3, 0.4]


def test_the_table_says_what_was_measured() -> None:
    text = table(with_shares(made_up_rows()), "otil-xdit eval --models tiny-sd", ["FID: no weights in /nowhere"])
    assert "| otil | 1.0 | 12.5% | 0.3 | 24.0 | 30.0% | 35.0 (34.0) ± 0.5 | 0.9800 | 1.04 | 1.00 |" in text
    assert "| otil:block=3 | failed: rank 1: ValueError: a \\| b |" in text
    assert text.count("###") == 2 and "### tiny-sd, 2 ranks, ddim, 4 steps, 2 pictures" in text
    assert "otil-xdit eval --models tiny-sd" in text and "Not measured: FID: no weights in /nowhere." in text
    table_lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table_lines} == {11}


def test_rows_are_written_as_json() -> None:
    (first, *_) = json.loads(json.dumps(as_json(made_up_rows(), "the command")))
    assert first["variant"] == "distrifusion" and first["versions"]["otil-xdit"] and first["command"] == "the command"


@pytest.mark.parametrize(
    "rows", [made_up_rows(), made_up_rows()[4:2:-1], made_up_rows()[-1:]], ids=["all", "no point", "failed"]
)
def test_the_plot_is_a_picture(rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    plot(rows, path)
    with Image.open(path) as image:
        assert image.width > 400 and len(image.convert("RGB").getcolors(1 << 24) or ()) > 10


def test_a_sheet_has_every_picture_and_its_difference() -> None:
    grey, lighter = torch.full((3, 64, 64), 0.25), torch.full((3, 64, 64), 0.3)
    assert difference(lighter, grey).max().item() == pytest.approx(0.05 * AMPLIFIED, abs=1e-5)
    assert difference(torch.ones(3, 2, 2), torch.zeros(3, 2, 2)).max() == 1
    page = sheet("title", ["first", "second"], [grey, grey], [Column("a", (lighter, lighter), ("20 dB", "21 dB"))])
    counts = {colour: count for count, colour in page.getcolors(1 << 16) or ()}
    for value in (0.25, 0.3, 0.05 * AMPLIFIED):
        assert counts[(round(value * 255),) * 3] >= 2 * (3 * 64) ** 2  # two rows of 64 pixels, enlarged by 3


def test_metrics_with_weights_are_offered_only_where_those_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = replace(weights.LPIPS, package="torch", where=lambda: tmp_path, measure=lambda *given: len(given[0]) / 2)
    monkeypatch.setattr(weights, "WEIGHTED", (metric,))
    images = [torch.zeros(3, 4, 4)]
    assert weights.absences(1) == [f"LPIPS: no alexnet-owt-7be5be79.pth in {tmp_path}"]
    assert weights.weighted_figures(images, images, ["a circle"]) == {}
    (tmp_path / "alexnet-owt-7be5be79.pth").touch()
    assert weights.absences(1) == [] and weights.weighted_figures(images, images, ["a circle"]) == {"LPIPS": 0.5}
    assert replace(metric, package="no_such").absence(1) == "LPIPS: the package no_such is not installed"
    assert weights.FID.absence(63) == "FID: it needs 64 pictures, and there are 63"


def test_weights_are_looked_for_where_their_packages_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    assert weights.FID.where() == weights.LPIPS.where() == tmp_path / "hub" / "checkpoints"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--openai--clip-vit-base-patch16"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    assert weights.CLIP.where() == cached / "snapshots" / "abc"


def test_clip_score_reads_a_folder(tmp_path: Path) -> None:
    """A random CLIP of a few thousand weights; a score is 100 times a cosine, so that it is the same at any scale."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(find_model("tiny-dit").folder + "/tokenizer")
    shared = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**shared, **special, "vocab_size": len(tokenizer)}
    vision = {**shared, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=1)
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    sizes = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    transformers.CLIPProcessor(image_processor=sizes, tokenizer=tokenizer).save_pretrained(tmp_path)
    images = [torch.rand(3, 16, 16) for _ in range(4)]
    prompts = ["a red circle", "a blue square", "a large green ring", "a small triangle"]
    found = [
        weights.CLIP.measure([image], [], [prompt], tmp_path / "model.safetensors")
        for image, prompt in zip(images, prompts, strict=True)
    ]
    assert {round(score, 3) for score in found} == {0.0, 100.0}, "cosines in one dimension are -1 and 1; -1 counts as 0"
    assert weights.CLIP.measure(images, [], prompts, tmp_path / "model.safetensors") == pytest.approx(sum(found) / 4)


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

    monkeypatch.setattr(generate, "run_to_end", fail)
    assert tools.main([*run, "sync", "naive"]) == 0
    again = {row["variant"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert {name: row["psnr"] for name, row in again.items()} == {"sync": sync["psnr"], "naive": naive["psnr"]}
    with pytest.raises(AssertionError, match="started"):
        tools.main([*run, "sync", "naive", "--fresh"])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "part"), [("tiny-sd", "unet"), ("tiny-dit", "transformer")])
def test_a_lora_is_in_every_picture(model: str, part: str, tmp_path: Path) -> None:
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
    found = [load_picture(path).image for name in ("with", "without") for path in (tmp_path / name / "cache").iterdir()]
    assert metrics.psnr(found[0], found[2]) < 40, "the LoRA changes nothing"


def test_a_failure_costs_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of torchrun: makes the pictures of a plan until it comes to ``naive``, where rank 1 fails first."""
    launched = []

    def torchrun(command: list[str], *args: object, **kwargs: object) -> int:
        path = Path(command[-1])
        plan = json.loads(path.read_text())
        launched.append([case["variant"] for case in plan["cases"]])
        for index, case in enumerate(plan["cases"]):
            if case["variant"] == "naive":
                for rank in (0, 1):
                    note = {"case": index, "rank": rank, "error": f"Error: {rank}", "time": 10 - rank}
                    (path.parent / f"failed-{rank}.json").write_text(json.dumps(note))
                return 1
            for picture in case["pictures"]:
                save_picture(Path(plan["store"]), picture["key"], Picture(torch.zeros(3, 1, 1), None, 0.0))
        return 0

    monkeypatch.setattr(generate, "run_to_end", torchrun)
    three = matrix(variants=tuple(parse_variant(name) for name in ("otil", "naive", "sync")))
    known = Store(tmp_path, three)
    assert generate.make_pictures(three, known, jobs=1, timeout=9) == {three.cases(2)[1]: "rank 1: Error: 1"}
    assert launched == [[None], ["otil", "naive", "sync"], ["sync"]]
    assert [len(known.missing(case)) for case in three.cases(2)] == [0, 2, 0]
    logs = [path.parent.name for path in tmp_path.glob("run-*/plan.json")]
    assert len(logs) == 1 and logs[0].startswith("run-2-"), "the one that failed is kept"


def test_variants_with_other_patches_have_a_torchrun_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []

    def torchrun(command: list[str], *args: object, **kwargs: object) -> int:
        plan = json.loads(Path(command[-1]).read_text())
        launched.append([case["variant"] for case in plan["cases"]])
        for key in (picture["key"] for case in plan["cases"] for picture in case["pictures"]):
            save_picture(Path(plan["store"]), key, Picture(torch.zeros(3, 1, 1), None, 0.0))
        return 0

    monkeypatch.setattr(generate, "run_to_end", torchrun)
    names = ("otil", "hybridiff:window=1:2", "sync", "hybridiff:window=2:3")
    three = matrix(variants=tuple(map(parse_variant, names)), ranks=(4,))
    assert generate.make_pictures(three, Store(tmp_path, three), jobs=1, timeout=9) == {}
    assert launched == [[None], [names[0], names[2]], [names[1], names[3]]]
    assert [case.patches for case in three.cases(4)] == [4, 2, 4, 2]


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
    twice = matrix(variants=(parse_variant("otil:ratio=1/8"), parse_variant("otil:ratio=0.125")))
    known = Store(tmp_path, twice)
    launch = generate._Launch(twice.cases(2), twice, known, 2)
    (case,) = json.loads(next(tmp_path.glob("run-2-*/plan.json")).read_text())["cases"]
    assert case["variant"] == "otil:ratio=1/8" and len(case["pictures"]) == 2 and launch.log.parent.parent == tmp_path


def test_an_error_is_one_line() -> None:
    def fail(error: Exception) -> str:
        try:
            raise error
        except Exception as raised:
            return last_line(raised)

    assert fail(ValueError("first\nlast\n")) == "ValueError: last"
    assert fail(AssertionError()) == "AssertionError: test_eval.py: raise error"


def test_a_stuck_torchrun_is_ended_and_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(generate, "WORKER", "sleeper")
    only = matrix(calls=(Call("a circle", 0),))
    failures = generate.make_pictures(only, Store(tmp_path / "cache", only), jobs=1, timeout=3.0)
    assert [str(case) for case in failures] == [
        "tiny-sd, ddim:3, one process",
        "tiny-sd, ddim:3, otil:ratio=1/8 on 2 ranks",
    ]
    alone, together = failures.values()
    assert alone == "no picture within 3 s" and together == f"no picture of one process to compare with ({alone})"
