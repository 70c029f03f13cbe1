"""Every argument of a wrapped pipeline's call is exact under `sync`, or refused by name on all ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.torchrun import lines_of

TOLERANCE = 5e-5
"""float32, as of the calls without these arguments (`tests/networks/test_dit_exactness.py`)."""
DIFFERENCE = 0.1
"""What xDiT's own way costs at least; the smallest seen is 0.5."""

EXACT = (
    ("sd3", "flip"),
    ("sd3", "scale"),
    ("sd3", "noise"),
    ("pixart-sigma", "mirror"),
    ("pixart-sigma", "noise"),
    ("hunyuandit", "flip"),
    ("hunyuandit", "noise"),
    ("flux", "flip"),
    ("flux", "noise"),
    ("cogvideox", "flip"),
    ("cogvideox", "scale"),
)
BY_THE_VALUE = ("scale",)
"""What a rank can do with its part of the latent, too."""
REFUSED = {
    ("sd3", "one rank flips"): "the callback changed the latents",
    ("sd3", "guidance cut by diffusers"): "callback_on_step_end wants prompt_embeds, pooled_prompt_embeds",
    ("sd3", "guidance cut"): "a callback that changes guidance_scale",
    ("sd3", "two images without guidance"): "guidance_scale is 1",
    ("pixart-sigma", "without guidance"): "guidance_scale is 1",
    ("hunyuandit", "without guidance"): "guidance_scale is 1",
    ("hunyuandit", "guidance_rescale"): "guidance_rescale",
    ("flux2", "attention_kwargs"): "attention_kwargs",
    ("cogvideox", "without guidance"): "guidance_scale is 1",
}


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], dict[str, Any]]:
    return {(line["case"], line["call"]): line for line in lines_of(2, "wrapped_calls.py")}


@pytest.mark.parametrize("probe", [*EXACT, ("flux2", "flip")], ids="-".join)
def test_exact(probe: tuple[str, str], found: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert found[probe]["refused"] == [None, None]
    assert found[probe]["difference"] <= TOLERANCE


@pytest.mark.parametrize("probe", [probe for probe in EXACT if probe[1] not in BY_THE_VALUE], ids="-".join)
def test_the_comparison_can_fail(probe: tuple[str, str], found: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert found[probe]["without"] > DIFFERENCE


@pytest.mark.parametrize("probe", REFUSED, ids="-".join)
def test_refused_by_name_on_all_ranks(probe: tuple[str, str], found: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert all(REFUSED[probe] in (said or "") for said in found[probe]["refused"]), found[probe]


@pytest.mark.slow
def test_exact_with_cfg_parallelism() -> None:
    lines = {(line["case"], line["call"]): line for line in lines_of(4, "wrapped_calls.py", "--cfg")}
    for probe in EXACT:
        if probe in lines:
            assert lines[probe]["difference"] is not None and lines[probe]["difference"] <= TOLERANCE, lines[probe]
    for probe, told in REFUSED.items():
        if probe in lines:
            assert all(told in (said or "") for said in lines[probe]["refused"]), lines[probe]
