"""diffusers' pipelines make the same images on two ranks as on one process (`tests/workers/unet_scenes.py`)."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from otil_xdit.xdit.cpu import enable_cpu_ranks

enable_cpu_ranks()

from tests.support.torchrun import lines_of  # noqa: E402
from tests.support.unet_scenes import SCENES  # noqa: E402

TELLING = (
    "SDXL, image",
    "no generator",
    "callback: prompt in place",
    "callback: guidance ends",
    "callback: error",
    "LoRA after, several, deleted",
    "IP-Adapter after",
    "FreeU",
    "fused projections",
    "perturbed attention guidance",
    "too few rows",
    "two ControlNets, uneven",
    "ControlNet, pooled",
)
"""One of each kind of thing that could go wrong, for the quick run."""
OPTIONS = {"patch 2": (), "cfg 2": ("--cfg",), "ulysses 2": ("--ulysses", "2")}


@cache
def results(scenes: tuple[str, ...], *options: str, ranks: int = 2) -> dict[str, dict[str, Any]]:
    """The lines of one torchrun, by scene."""
    lines = lines_of(ranks, "unet_scenes.py", *options, "--scenes", *scenes, timeout=1800, may_fail=True)
    return {line["scene"]: line for line in lines}


@pytest.mark.parametrize("scene", TELLING)
def test_two_ranks_do_what_one_process_does(scene: str) -> None:
    line = results(TELLING)[scene]
    assert line["passed"], line


@pytest.mark.slow
@pytest.mark.parametrize("ranks, options", [(3, ()), (4, ("--cfg",)), (4, ("--ulysses", "2"))])
@pytest.mark.parametrize("scene", [scene for scene in SCENES if "ControlNet" in scene])
def test_controlnets_on_more_ranks(scene: str, ranks: int, options: tuple[str, ...]) -> None:
    line = results(tuple(name for name in SCENES if "ControlNet" in name), *options, ranks=ranks)[scene]
    assert line["passed"], line


UNEVEN = ("SDXL, image", "two ControlNets, uneven", "img2img, image", "SDXL refiner")


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, options",
    [(2, ("2,1",)), (2, ("1,2",)), (3, ("1,3,2",)), (4, ("3,1", "--cfg")), (4, ("2,1", "--ulysses", "2"))],
)
@pytest.mark.parametrize("scene", UNEVEN)
def test_patches_of_unequal_shares(scene: str, ranks: int, options: tuple[str, ...]) -> None:
    line = results(UNEVEN, "--shares", *options, ranks=ranks)[scene]
    assert line["passed"], line


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("scene", SCENES)
def test_two_ranks_do_in_all_scenes_what_one_process_does(scene: str, options: tuple[str, ...]) -> None:
    if scene == "too few rows" and options == ("--cfg",):
        pytest.skip("each rank has all rows")
    line = results(tuple(SCENES), *options)[scene]
    assert line["passed"], line
