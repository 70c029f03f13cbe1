"""Image to image and inpainting with DiTs; previews of their packed latents."""

from __future__ import annotations

import pytest
import torch

from otil_xdit.serve.ranks.drawing import pixels_of
from otil_xdit.serve.ranks.previews import decode_small, unpacked
from tests.support.dits import CASES
from tests.support.dits.weights import seeded
from tests.support.torchrun import lines_of


@pytest.mark.parametrize("name", ["flux", "qwen-image", "z-image"])
@torch.no_grad()
def test_a_preview_of_the_last_step_is_the_image(name: str) -> None:
    pipe, call = CASES[name].build(), {**CASES[name].arguments(), "num_inference_steps": 1}
    seeded(pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def on_step(pipe: object, step: int, timestep: object, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(tensors["latents"])
        return {}

    (image,) = pipe(**{**call, "output_type": "pil"}, callback_on_step_end=on_step).images
    latents = unpacked(pipe, seen[0], call["height"], call["width"])
    assert latents is not None and latents.shape[-2:] == (16, 16)
    assert decode_small(pipe, latents) == pixels_of(image) and len(set(pixels_of(image).data)) > 9
    assert unpacked(pipe, seen[0].flatten(1)[:, :8].unsqueeze(0), None, None) is None


@pytest.mark.slow
def test_edits_on_two_ranks_are_those_of_diffusers() -> None:
    lines = lines_of(2, "served_edits.py")
    assert len(lines) == 9
    for line in lines:
        assert line["ranks_agree"], line
        if line["kind"] == "cancelled":
            assert line["left"] == "after step 3 of 5", line
        else:
            assert line["off"] <= 1 and line["away"] > 2 and len(line["previews"]) == 2, line
