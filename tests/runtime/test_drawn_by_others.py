"""An image drawn on two ranks with a codec and a change score that another package registers."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

import otil_xdit
from otil_xdit import OtilConfig
from otil_xdit.catalog.bundled import model_folder
from otil_xdit.catalog.folders import OWN, load_pipe
from tests.support.another_package import Half, register
from tests.support.ranks import run_ranks

CALL = {"height": 128, "width": 128, "num_inference_steps": 12, "guidance_scale": 4.0, "output_type": "pt"}

SETTINGS: dict[str, dict[str, Any]] = {
    "all, raw": {"ratio": 1.0, "extrapolation": "none", "warmup_codec": "raw", "codec": "raw"},
    "all, half": {"ratio": 1.0, "extrapolation": "none", "warmup_codec": "half", "codec": "half"},
    "default": {},
    "default, half": {"codec": "half"},
    "default, half, first": {"codec": "half", "select": "kv-first"},
}


def draw(pipe: Any) -> torch.Tensor:
    """An image, [1, 3, H, W] in [0, 1]."""
    return pipe("a large red circle on the left", generator=torch.Generator().manual_seed(0), **CALL).images


def psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    return -10 * (image - reference).square().mean().log10().item()


def drawn() -> dict[str, dict[str, float]]:
    """PSNR to one process, and bytes: those of keys and values that were counted, and those that `Half` wrote."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    register()
    pipe, found = load_pipe(model_folder("tiny-sd"), OWN, None), {}
    pipe.set_progress_bar_config(disable=True)
    exact = draw(pipe)
    for name, settings in SETTINGS.items():
        Half.written = 0
        otil_xdit.parallelize(pipe, "otil", OtilConfig(**settings))
        near = psnr(draw(pipe), exact)
        sent = otil_xdit.report(pipe).sent_bytes["kv"]
        found[name] = {"psnr": near, **sent, "written": Half.written}
        otil_xdit.restore(pipe)
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    here, there = run_ranks(2, drawn)
    assert here == there, "both ranks have half of the rows, and the whole image"
    return here


def test_a_codec_of_another_package_draws_the_image_with_the_bytes_that_it_writes(
    found: dict[str, dict[str, float]],
) -> None:
    raw, half = found["all, raw"], found["all, half"]
    assert half["psnr"] == pytest.approx(raw["psnr"], abs=0.5) and half["psnr"] > 48
    assert half["warmup"] + half["steady"] == half["written"], "without selection and gains nothing else travels"
    assert (2 * half["warmup"], 2 * half["steady"]) == (raw["warmup"], raw["steady"])


def test_it_goes_with_prediction_and_selection(found: dict[str, dict[str, float]]) -> None:
    ours, half = found["default"], found["default, half"]
    assert half["psnr"] > ours["psnr"] + 1, "16 bits of a residual instead of 2"
    indices_and_gains = half["steady"] - half["written"]
    assert 0 < indices_and_gains < 0.01 * half["written"], "warm-up is in int8, which it does not write"


def test_a_change_score_of_another_package_selects(found: dict[str, dict[str, float]]) -> None:
    ours, first = found["default, half"], found["default, half, first"]
    assert first["steady"] == ours["steady"]
    assert 55 < first["psnr"] < ours["psnr"], "other sub-blocks are sent, which say less"
