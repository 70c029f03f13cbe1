"""`otil-xdit eval` of models that draw clips: what it takes and refuses, its figures, and a run on two ranks."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from otil_xdit.catalog.folders import Model, find_model
from otil_xdit.tools import main as tools
from otil_xdit.tools.common.variants import parse_variant
from otil_xdit.tools.eval import metrics
from otil_xdit.tools.eval.cache import DrawnImage, ImageCache
from otil_xdit.tools.eval.cli import add_arguments, read_matrix
from otil_xdit.tools.eval.equivalents import parse_equivalent
from otil_xdit.tools.eval.matrix import Call, Matrix, Sampler
from otil_xdit.tools.eval.report import table
from otil_xdit.tools.eval.rows import Row, with_figures
from tests.support.dits.weights import seeded

TRAIN = Path(__file__).resolve().parents[2] / "examples" / "train"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """A pipeline folder of Wan's kind, without weights."""
    files = {
        "model_index.json": {"_class_name": "WanPipeline"},
        "vae/config.json": {"scale_factor_spatial": 4, "scale_factor_temporal": 2},
        "transformer/config.json": {"patch_size": [1, 2, 2]},
    }
    for name, facts in files.items():
        path = tmp_path / "wan" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts))
    return find_model(str(tmp_path / "wan"), videos=True)


def matrix(model: Model, **changes: Any) -> Matrix:
    known: dict[str, Any] = {
        "models": (model,),
        "variants": (parse_variant("otil"),),
        "ranks": (2,),
        "samplers": (Sampler("own", 9),),
        "calls": (Call("a circle", 0),),
        "size": 64,
    }
    return Matrix(**{**known, **changes})


def test_a_clips_model_is_known_by_its_folder(model: Model) -> None:
    assert (model.vae, model.patch, model.frames, model.is_unet) == (4, 2, 2, False)
    assert model.borders(64, 2) == (), "patches are runs of tokens"
    with pytest.raises(ValueError, match="is a WanPipeline; give a folder of .*StableDiffusion3Pipeline$"):
        find_model(model.name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 8}, "--frames 8: .* give 1, 3, 5"),
        ({"size": 60}, "--size 60 .*; give a multiple of 8"),
        ({"cfg_parallel": True}, "--use_cfg_parallel: xDiT has no CFG parallelism"),
        ({"variants": (parse_variant("hybridiff"),)}, "--presets hybridiff: xDiT has no CFG parallelism"),
        ({"equivalents": (None, parse_equivalent("rotated:1"))}, "--variant rotated:1: .* leave it out"),
        ({"models": (find_model("tiny-dit"), "wan")}, "draws clips and others images; give them apart"),
    ],
    ids=["frames", "size", "halves", "hybridiff", "equivalent", "images too"],
)
def test_what_a_clip_cannot_be(model: Model, changes: dict[str, Any], message: str) -> None:
    models = tuple(model if one == "wan" else one for one in changes.get("models", (model,)))
    with pytest.raises(ValueError, match=message):
        matrix(model, **{**changes, "models": models})
    assert matrix(model, guidance=1.0, ranks=(2, 3)).cases(3), "tokens are filled up until 3 ranks divide them"


def test_frames_are_of_clips(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tools.main(["eval", "--dry_run", "--models", "tiny-sd", "--frames", "9"])
    assert "--frames 9: tiny-sd draws images; leave it out" in capsys.readouterr().err
    line = ["--models", model.folder, "--samplers", "own:3", "--size", "64", "--prompts", "8", "--frames", "5"]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    made = read_matrix(parser.parse_args(line))
    assert made.frames == 5 and all("moving" in call.prompt for call in made.calls)


def test_a_key_changes_with_the_number_of_frames(model: Model, tmp_path: Path) -> None:
    keys = {
        ImageCache(tmp_path / "cache", made).key(case, made.calls[0])
        for frames in (5, 9)
        for made in [matrix(model, frames=frames)]
        for case in (made.references[0], *made.cases(2))
    }
    assert len(keys) == 4


def test_flicker_is_what_changes_of_the_error() -> None:
    clip = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert metrics.flicker(clip + 0.1, clip) == pytest.approx(0.0, abs=1e-4), "it stands still"
    sign = torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1, 1)
    assert metrics.flicker(clip + sign / 255, clip) == pytest.approx(2.0, rel=1e-3)
    # 20 dB in the first frame and 40 in the second, whose squared errors would come to 23.
    still = torch.zeros(2, 3, 16, 16)
    assert metrics.psnr(still + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1), still) == pytest.approx(30.0, abs=1e-3)
    assert metrics.ssim(clip, clip) == pytest.approx(1.0)


def test_a_clips_row_has_flicker_and_no_seam() -> None:
    still = DrawnImage(torch.zeros(2, 3, 16, 16), None, 1.0)
    made = replace(still, image=still.image + torch.tensor([0.1, 0.2]).view(2, 1, 1, 1))
    row = with_figures(Row("wan", "otil", "otil", 2, "own", 4), [made], [still], ())
    assert row.seam is None and row.flicker == pytest.approx(25.5)
    text = table([row], "", [])
    assert "1 clip\n" in text and "| flicker |" in text and "| 25.50 |" in text and "| seam |" not in text
    assert "| flicker |" not in table([replace(row, flicker=None)], "", [])


@pytest.mark.slow
def test_what_the_training_scripts_write_is_compared_on_two_ranks(tmp_path: Path) -> None:
    """A few steps of training, then the folder with random weights in their place, for the few change nothing yet."""
    work, folder = tmp_path / "work", tmp_path / "tiny-video"
    short = {
        "video_vae.py": ["--minutes", "0.02", "--clips", "16", "--batch", "2"],
        "tiny_video.py": ["--out", str(folder), "--coarse", "0.02", "--fine", "0.02", "--batch", "4"],
    }
    for script, flags in short.items():
        line = [sys.executable, str(TRAIN / script), "--work", str(work), *flags]
        done = subprocess.run(line, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
    seeded(WanTransformer3DModel.from_pretrained(folder / "transformer")).save_pretrained(folder / "transformer")
    run = ["eval", "--models", str(folder), "--samplers", "own:3", "--size", "64", "--prompts", "1", "--presets"]
    assert tools.main([*run, "sync", "naive", "otil", "--out", str(tmp_path)]) == 0
    rows = {row["variant"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    sync, otil, naive = (rows[name] for name in ("sync", "otil", "naive"))
    # What is decoded is nearly flat, so that other latents show little.
    assert sync["psnr"] > 110 > max(otil["psnr"], naive["psnr"]) and otil["seam"] is None
    assert sync["flicker"] < 0.001 < min(otil["flicker"], naive["flicker"])
    assert otil["kv_bytes"] < sync["kv_bytes"] / 16 and sync["kv_total"] == pytest.approx(3 * sync["kv_bytes"])
    assert (tmp_path / "sheet-tiny-video-2-own-3.png").is_file()
