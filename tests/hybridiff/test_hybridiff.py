"""Two stages on real ranks: exact with the window closed, half the FLOPs in it, the same image every time."""

from __future__ import annotations

from typing import Any

import pytest

from otil_xdit.errors import FlagError
from otil_xdit.runtime.strategies import get_strategy
from otil_xdit.xdit.flags.choice import choose
from tests.support.torchrun import lines_of
from tests.workers.hybridiff import FIRST, LAST, STEPS

EXACT = 1e-4


@pytest.fixture(scope="module")
def on_two() -> dict[str, Any]:
    return {line["model"]: line for line in lines_of(2, "hybridiff.py", "tiny-sd", "tiny-dit")}


MODELS = pytest.mark.parametrize("model", ["tiny-sd", "tiny-dit"])


@MODELS
def test_with_the_window_closed_it_is_cfg_parallelism(on_two: dict[str, Any], model: str) -> None:
    line = on_two[model]
    assert line["closed_to_cfg"] <= EXACT
    assert line["closed_to_one"] <= EXACT
    assert line["open_to_one"] > 10 * EXACT, "the window makes no difference: the lines above show nothing"
    assert line["open_to_one"] < line["scale"]


@MODELS
def test_flops_are_those_of_the_schedule(on_two: dict[str, Any], model: str) -> None:
    """In the window each rank computes its segment, and neither the other one nor the other pass."""
    line = on_two[model]
    for half in (0, 1):
        segments = [flops // 2 for flops in line["open_cut"][half]["flops"]]  # those of two ranks are added up
        saved = line["closed_flops"][half] - line["open_flops"][half]
        assert saved == (LAST - FIRST) * segments[1 - half]
        assert 0.35 < segments[half] / sum(segments) < 0.65


@MODELS
def test_bytes_are_counted(on_two: dict[str, Any], model: str) -> None:
    """What travels between the segments does so once a step of the window, but not at its last."""
    line = on_two[model]
    first, second = (report["sent_bytes"] for report in line["open_report"])
    assert first["stages"]["steady"] == (LAST - FIRST - 1) * line["open_cut"][0]["boundary"]
    assert second["stages"]["steady"] == 0


@MODELS
def test_the_report_has_the_curve_and_the_window(on_two: dict[str, Any], model: str) -> None:
    closed, opened = on_two[model]["closed_report"], on_two[model]["open_report"]
    for reports in (closed, opened):
        assert all(report["discrepancy"] == reports[0]["discrepancy"] for report in reports), "the same on every rank"
    curve = closed[0]["discrepancy"]
    assert len(curve) == STEPS and all(0 < value < 2 for value in curve)
    assert closed[0]["window"][0] == closed[0]["window"][1]
    assert opened[0]["window"] == [FIRST, LAST]
    assert opened[0]["discrepancy"][:FIRST] == pytest.approx(curve[:FIRST], rel=1e-4)
    assert opened[0]["discrepancy"][FIRST:LAST] == [None] * (LAST - FIRST)


@MODELS
def test_patches_may_be_displaced_in_a_window_only(on_two: dict[str, Any], model: str) -> None:
    line = on_two[model]
    first, second = line["windowed"]
    assert first["window"] == [FIRST, LAST]
    curve = line["closed_report"][0]["discrepancy"]
    assert first["discrepancy"] == second["discrepancy"], "of all patches, on every rank"
    assert first["discrepancy"][:FIRST] == pytest.approx(curve[:FIRST], rel=1e-4), "exact up to the window"
    assert first["discrepancy"][FIRST] != pytest.approx(curve[FIRST], rel=1e-6), "and not in it"


@MODELS
def test_restore_leaves_nothing(on_two: dict[str, Any], model: str) -> None:
    assert on_two[model]["left"] == []


@MODELS
def test_image_two_is_image_one(on_two: dict[str, Any], model: str) -> None:
    assert on_two[model]["differing"] == []


DITS = ("sd3", "pixart-alpha", "pixart-sigma", "hunyuandit")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_other_dits_in_two_stages(ranks: int) -> None:
    degrees = f"{ranks // 2},1,2"
    lines = lines_of(
        ranks, "dit_exactness.py", "--cases", *DITS, "--degrees", degrees, "--exchange", "closed", "stages", timeout=400
    )
    assert [line["stopped"] for line in lines] == [None] * (2 * len(DITS)), lines
    for line in lines:
        if line["exchange"] == "closed":
            assert line["max_abs_error"] <= EXACT, line
        else:
            # Random weights make no image: that it runs, and that a step in two stages is another one.
            assert EXACT < line["max_abs_error"] < 3 * line["max_abs_reference"], line


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-sd", "tiny-sdxl", "tiny-dit"])
def test_on_four_ranks_patches_are_inside_the_halves(model: str) -> None:
    (line,) = lines_of(4, "hybridiff.py", model, timeout=400)
    assert line["closed_to_one"] <= EXACT
    assert 10 * EXACT < line["open_to_one"] < line["scale"]
    assert line["differing"] == []


VALUES = {"parallel": "hybridiff", "model": "tiny-sd", "height": 128, "width": 128}


def test_the_flag_takes_cfg_parallelism_as_given() -> None:
    choice = choose(VALUES, 4)
    assert choice is not None
    assert choice.patch_degree == 2
    assert choice.config.requires_cfg_parallel and choice.config.window == "auto"


@pytest.mark.parametrize(
    ("given", "ranks", "message"),
    [
        ({}, 3, "--parallel hybridiff implies --use_cfg_parallel: 3 processes cannot be shared out"),
        ({"guidance_scale": 1.0}, 2, "--guidance_scale is 1; .* give more than 1"),
        ({"num_inference_steps": 15, "otil_window": "12:17"}, 2, "--otil_window is '12:17'.*15 steps"),
        ({"num_inference_steps": 5}, 2, "--otil_window_steps is 5; in a run of 5 steps give at most 4"),
        ({"num_inference_steps": 15, "otil_window_cap": 12}, 2, "--otil_window_cap is 12.*give at most 10"),
        ({"otil_window": "none"}, 2, "--otil_window is 'none'; two stages work in a window"),
        ({"otil_window": "0:4"}, 2, "--otil_window is '0:4'"),
        ({"otil_window_guidance": "half"}, 2, "--otil_window_guidance is 'half'; choose from held, none"),
    ],
)
def test_wrong_use_is_refused(given: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(FlagError, match=message):
        choose({**VALUES, **given}, ranks)


def test_otil_takes_a_window_too() -> None:
    config = get_strategy("otil").make_config({"window": "auto"})
    assert config.needs_guidance and not config.requires_cfg_parallel
    with pytest.raises(FlagError, match="--guidance_scale is 1"):
        choose({**VALUES, "parallel": "otil", "otil_window": "auto", "guidance_scale": 1.0}, 2)
