"""A newcomer's first line: the shipped models load and run in plain diffusers, whatever type is named, or none."""

from __future__ import annotations

import warnings

import diffusers
import pytest
import torch

from otil_xdit.catalog import folders
from otil_xdit.catalog.bundled import BUNDLED, absent_parts, model_folder
from otil_xdit.catalog.folders import OWN, load_pipe


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


def test_loading_uses_no_name_that_diffusers_has_given_up() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pipe = load_pipe(model_folder("tiny-sd"), OWN, None, torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16 and pipe.text_encoder.dtype == torch.bfloat16
    assert not [one for one in said if "dtype" in str(one.message)]


@pytest.mark.parametrize(("installed", "name"), [("0.39.0", "torch_dtype"), ("0.40.0.dev0", "dtype"), ("1.0", "dtype")])
def test_each_diffusers_is_given_the_name_that_it_knows(
    installed: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "version", lambda package: installed)
    assert folders.dtype_argument(torch.float16) == {name: torch.float16}
