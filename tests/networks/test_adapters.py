"""PEFT's adapters on patches give what they give in one process, or are refused by name on all ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.torchrun import lines_of

TOLERANCE = 1e-5
"""float32, images of one step: rounding is 1.5e-6 at most, and zeros at a patch's edge cost 5e-3 at least."""
EXACT = ("LoRA", "DoRA", "IA3", "IA3 of inputs")
REFUSED = ("LoKr", "LoHa", "HRA", "HiRA", "BOFT")


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return {line["adapter"]: line for line in lines_of(2, "adapters.py")}


@pytest.mark.parametrize("adapter", EXACT)
def test_those_that_call_layers_are_exact_on_convolutions(adapter: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[adapter]["on convolutions"]["refused"] is None
    assert found[adapter]["on convolutions"]["difference"] < TOLERANCE


@pytest.mark.parametrize("adapter", REFUSED)
def test_those_that_compute_the_convolution_are_refused_by_name(adapter: str, found: dict[str, dict[str, Any]]) -> None:
    told = found[adapter]["on convolutions"]["refused"]
    assert told is not None
    assert "adapter on the convolution unet." in told and f"peft.tuners.{adapter.lower()}." in told


@pytest.mark.parametrize("adapter", [*EXACT, *REFUSED])
def test_merged_and_on_linear_layers_all_are_exact(adapter: str, found: dict[str, dict[str, Any]]) -> None:
    for way in ("merged", "on linear layers"):
        assert found[adapter][way]["refused"] is None, way
        assert found[adapter][way]["difference"] < TOLERANCE, way


@pytest.mark.parametrize("adapter", REFUSED)
def test_what_is_refused_would_be_wrong(adapter: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[adapter]["not refused"]["difference"] > 100 * TOLERANCE
