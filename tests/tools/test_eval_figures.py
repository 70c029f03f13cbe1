"""What `otil-xdit eval` measures of images, and what it writes: rows, tables, plots, contact sheets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from otil_xdit.catalog.folders import find_model
from otil_xdit.tools.eval import metrics
from otil_xdit.tools.eval import perceptual_metrics as weights
from otil_xdit.tools.eval.cache import DrawnImage
from otil_xdit.tools.eval.contact_sheets import AMPLIFIED, Column, difference, sheet
from otil_xdit.tools.eval.report import plot, table
from otil_xdit.tools.eval.rows import Row, as_json, with_figures, with_shares


def test_psnr_of_a_known_error() -> None:
    black = torch.zeros(3, 16, 16)
    assert metrics.psnr(black + 0.1, black) == pytest.approx(20.0, abs=1e-4)  # -20 log10 0.1
    assert metrics.psnr(black, black) == metrics.IDENTICAL
    assert metrics.ssim(black, black) == pytest.approx(1.0)
    drawn = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert metrics.ssim(drawn, 1 - drawn) < 0


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


def test_borders_are_where_the_images_are_cut() -> None:
    assert find_model("tiny-dit").borders(128, 4) == (32, 64, 96)
    assert find_model("tiny-sd").borders(128, 2) == (64,)
    assert find_model("tiny-sd").borders(128, 3) == (64, 96)  # 4 rows at the lowest resolution: 2, 1, 1


def images(offset: float, sent: dict[str, dict[str, int]]) -> DrawnImage:
    report = {"kv_bytes_per_step": sent["kv"]["steady"] / 2, "small_bytes_per_step": 10.0, "sent_bytes": sent}
    return DrawnImage(torch.full((3, 16, 16), 0.5 + offset), report, 2.0)


ROW = Row("tiny-sd", "otil", "otil", 2, "ddim", 4)


def test_a_row_is_the_mean_over_its_images() -> None:
    best = [DrawnImage(torch.full((3, 16, 16), 0.5), None, 1.0)] * 2
    sent = {"kv": {"warmup": 900, "steady": 100}, "halo": {"warmup": 7, "steady": 7}}
    row = with_figures(ROW, [images(0.1, sent), images(0.01, sent)], best, [8])
    assert (row.psnr, row.psnr_min, row.psnr_std) == pytest.approx((30.0, 20.0, 10.0), abs=1e-2)
    assert (row.kv_bytes, row.small_bytes, row.kv_total, row.kv_range) == (50.0, 10.0, 1000.0, None)
    assert (row.images, row.seconds, row.seam) == (2, 2.0, pytest.approx(1.0))
    odd = with_figures(ROW, [images(0.1, sent), images(0.1, {**sent, "kv": {"warmup": 900, "steady": 300}})], best, [8])
    assert odd.kv_range == (1000, 1200) and "1.0 to 1.2 kB" in table([odd], "", [])


def test_one_patch_has_no_seam() -> None:
    best = [DrawnImage(torch.full((3, 16, 16), 0.5), None, 1.0)]
    seen = {"window": (4, 9), "discrepancy": [0.5, None]}
    made = images(0.1, {"kv": {"warmup": 0, "steady": 0}})
    row = with_figures(ROW, [replace(made, report={**made.report, **seen})], best, [])
    assert row.seam is None and row.psnr == pytest.approx(20.0, abs=1e-2)
    assert (row.windows, row.discrepancies) == (((4, 9),), ([0.5, None],))


def made_up_rows() -> list[Row]:
    figures = {"images": 2, "psnr_std": 0.5, "ssim": 0.98, "seam": 1.04, "small_bytes": 300.0, "seconds": 1.0}
    rows = [
        replace(ROW, variant="distrifusion", preset="distrifusion", kv_bytes=8e3, kv_total=80e3, psnr=39.0),
        replace(ROW, kv_bytes=1e3, kv_total=24e3, psnr=35.0, psnrs=(34.0, 36.0)),
        replace(ROW, variant="otil:ratio=1/4", kv_bytes=2e3, kv_total=32e3, psnr=37.0),
        replace(ROW, variant="naive", preset="naive", kv_bytes=0.0, kv_total=16e3, psnr=28.0),
        replace(ROW, variant="sync", preset="sync", kv_bytes=8e3, kv_total=80e3, psnr=130.0),
        replace(ROW, variant="sync", preset="sync", ranks=4, kv_bytes=8e3, kv_total=80e3, psnr=130.0),
    ]
    done = [replace(row, psnr_min=(row.psnr or 0) - 1, **figures) for row in rows]  # type: ignore[arg-type]  # many kinds
    return [*done, replace(ROW, variant="otil:block_size=3", error="rank 1: ValueError: a | b")]


def test_shares_are_of_distrifusion_in_the_same_place() -> None:
    rows = with_shares(made_up_rows())
    assert [row.kv_share for row in rows] == [1.0, 1 / 8, 1 / 4, 0.0, 1.0, None, None]
    assert [row.total_share for row in rows[:3]] == [1.0, 0.3, 0.4]


def test_the_table_says_what_was_measured() -> None:
    text = table(with_shares(made_up_rows()), "otil-xdit eval --models tiny-sd", ["FID: no weights in /nowhere"])
    assert "| otil | 1.0 | 12.5% | 0.3 | 24.0 | 30.0% | 35.0 (34.0) ± 0.5 | 0.9800 | 1.04 | 1.00 |" in text
    assert "| otil:block_size=3 | failed: rank 1: ValueError: a \\| b |" in text
    assert text.count("###") == 2 and "### tiny-sd, 2 ranks, ddim, 4 steps, 2 images" in text
    assert "otil-xdit eval --models tiny-sd" in text and "Not measured: FID: no weights in /nowhere." in text
    table_lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table_lines} == {11}


def test_a_title_says_how_ranks_and_numbers_are_used() -> None:
    text = table([replace(made_up_rows()[0], cfg_parallel=True, dtype="float16")], "", [])
    assert "### tiny-sd, 2 ranks in two halves, ddim, 4 steps, float16, 2 images" in text


def test_one_process_has_no_bytes() -> None:
    best = [DrawnImage(torch.full((3, 16, 16), 0.5), None, 1.0)]
    row = with_figures(ROW, [replace(best[0], image=best[0].image + 0.1)], best, [8])
    assert row.psnr == pytest.approx(20.0, abs=1e-2) and row.kv_bytes is row.kv_total is None


def test_rows_are_written_as_json() -> None:
    (first, *_) = json.loads(json.dumps(as_json(made_up_rows(), "the command")))
    assert first["variant"] == "distrifusion" and first["versions"]["otil-xdit"] and first["command"] == "the command"


@pytest.mark.parametrize(
    "rows", [made_up_rows(), made_up_rows()[4:2:-1], made_up_rows()[-1:]], ids=["all", "no point", "failed"]
)
def test_the_plot_is_a_image(rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    plot(rows, path)
    with Image.open(path) as image:
        assert image.width > 400 and len(image.convert("RGB").getcolors(1 << 24) or ()) > 10


def test_a_sheet_has_every_image_and_its_difference() -> None:
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
    assert weights.FID.absence(63) == "FID: it needs 64 images, and there are 63"


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
