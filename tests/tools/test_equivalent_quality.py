"""Images on patches are as near one process's from a network's equivalent, and with CFG parallelism."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from otil_xdit.tools import main as tools
from tests.support.torchrun import lines_of

LEAST = {"tiny-sd": 52.0, "tiny-sdxl": 50.0, "tiny-dit": 44.0}
"""PSNR to one process's image, in dB, of the shipped network's image."""


@pytest.mark.parametrize(
    "variant",
    [
        "rotated:1",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("log-normal:1", "outliers:32", "heads:32")),
    ],
)
def test_an_equivalent_loses_next_to_nothing(variant: str) -> None:
    lines = lines_of(2, "equivalents.py", variant)
    assert [line["model"] for line in lines] == list(LEAST)
    for line in lines:
        assert line["shipped"] > LEAST[line["model"]], line
        assert line["changed"] > line["shipped"] - 1.5, line


@pytest.mark.slow
def test_halves_are_as_near_as_the_same_patches_alone(tmp_path: Path) -> None:
    """Guidance multiplies the difference of the passes' errors, so these must be alike."""
    run = ["eval", "--models", "tiny-sd", "--samplers", "dpm-solver:15", "--prompts", "4", "--presets", "otil"]
    found = []
    for ranks in (["2"], ["4", "--use_cfg_parallel"]):
        assert tools.main([*run, "--ranks", *ranks, "--out", str(tmp_path)]) == 0
        (row,) = json.loads((tmp_path / "rows.json").read_text())
        found.append(row["psnr"])
    patches, halves = found
    assert halves > patches - 0.5  # 58.6 and 57.4 dB; 56.2 where the halves do not agree
