"""The shipped model of clips: it loads in plain diffusers, draws what is said, and is exact on ranks that wait."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from otil_xdit.catalog.bundled import model_folder
from otil_xdit.catalog.folders import find_model
from otil_xdit.tools import main as tools
from otil_xdit.tools.eval.matrix import VIDEO_PROMPTS

FOLDER = Path(model_folder("tiny-video"))
CLIP = {"height": 64, "width": 64, "num_frames": 9, "output_type": "np"}


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["no type", "float16"])
def test_it_runs_in_plain_diffusers(dtype: torch.dtype | None) -> None:
    pipe = WanPipeline.from_pretrained(FOLDER, **({} if dtype is None else {"torch_dtype": dtype}))
    types = {part.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module)}
    assert types == {dtype or torch.float32}
    frames = pipe("a large red circle moving right, smooth background", num_inference_steps=1, **CLIP).frames
    assert frames.shape == (1, 9, 64, 64, 3) and (frames == frames).all()


def test_it_draws_what_is_said() -> None:
    """Something red, and more to the right in the last frame than in the first."""
    pipe = WanPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    said = "a large red circle moving right, smooth background"
    made = pipe(said, num_inference_steps=8, guidance_scale=4.0, generator=torch.manual_seed(0), **CLIP).frames[0]
    redness = torch.from_numpy(made[..., 0] - made[..., 1:].max(-1)).clamp(min=0.2) - 0.2
    columns = (redness.sum(1) * torch.arange(64)).sum(-1) / redness.sum((1, 2))
    assert columns[-1] - columns[0] > 14, "it should go 28 pixels"


def test_its_name_is_that_of_clips_only() -> None:
    assert find_model("tiny-video", videos=True).folder == str(FOLDER)
    with pytest.raises(ValueError, match="--models tiny-video: no such model"):
        find_model("tiny-video")


def test_its_card_and_its_size() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert "license: apache-2.0" in (FOLDER / "README.md").read_text()
    assert all(path.suffix in (".safetensors", ".json", ".md", ".png") for path in files)


@pytest.mark.slow
def test_two_ranks_that_wait_are_one_process(tmp_path: Path) -> None:
    run = ["eval", "--models", "tiny-video", "--samplers", "own:5", "--prompts", "1", "--presets", "sync", "naive"]
    assert tools.main([*run, "--out", str(tmp_path)]) == 0
    sync, naive = json.loads((tmp_path / "rows.json").read_text())
    assert sync["psnr"] > 100 and sync["flicker"] < 0.01
    assert naive["psnr"] < 60, "the exchange makes no difference: the line above shows nothing"
    assert len(VIDEO_PROMPTS.read_text().splitlines()) == 8
