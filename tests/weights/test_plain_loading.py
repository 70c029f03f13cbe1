"""A newcomer's first line: the shipped models load and run in plain diffusers, whatever type is named, or none."""

from __future__ import annotations

import diffusers
import pytest
import torch

from otil_xdit.catalog.bundled import BUNDLED, absent_parts, model_folder


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["no type", "float16"])
def test_a_shipped_model_runs_in_plain_diffusers(name: str, dtype: torch.dtype | None) -> None:
    folder = model_folder(name)
    given = {} if dtype is None else {"torch_dtype": dtype}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **given, **absent_parts(folder))
    types = {part.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module)}
    assert types == {dtype or torch.float32}
    images = pipe("a red circle", height=64, width=64, num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 64, 64, 3) and (images == images).all()
