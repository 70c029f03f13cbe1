"""A network's equivalent makes as good an image on two ranks as the network itself."""

from __future__ import annotations

import pytest

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
