"""Folders whose configs or weights are not whole are named before anything starts."""

from __future__ import annotations

import json
import shutil
from inspect import signature
from pathlib import Path

import diffusers
import pytest

from otil_xdit.catalog.bundled import model_folder
from otil_xdit.catalog.unets import read_folder
from otil_xdit.catalog.weight_files import check_weights, variant_of
from otil_xdit.errors import FlagError

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder("tiny-sd"), tmp_path / "a model"))


def set_config(folder: Path, **values: object) -> None:
    path = folder / "unet" / "config.json"
    settings = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in settings.items() if value != "absent"}))


def test_whole_weights_pass(folder: Path) -> None:
    check_weights(str(folder))
    assert variant_of(str(folder)) is None


def test_weights_that_are_missing_or_cut_off_are_named(folder: Path) -> None:
    whole = (folder / UNET).read_bytes()
    for kept, said in ((5_000_000, f"cut off: 5000000 bytes of {len(whole)}"), (100, "cut off after 100 bytes")):
        (folder / UNET).write_bytes(whole[:kept])
        with pytest.raises(FlagError, match=f"{UNET} is {said}"):
            check_weights(str(folder))
    (folder / UNET).unlink()
    with pytest.raises(FlagError, match="unet has no weights"):
        check_weights(str(folder))
    index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").write_bytes(whole)
    with pytest.raises(FlagError, match="unet/diffusion_pytorch_model-00001-of-00002.safetensors is missing"):
        check_weights(str(folder))


def test_a_folder_of_fp16_files_only_loads(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    check_weights(str(folder))
    assert variant_of(str(folder)) == "fp16"
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, variant=variant_of(str(folder)))
    assert pipe.unet.conv_in.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"attention_head_dim": [8, 8, 8]}, "attention_head_dim has 3 numbers for 4 down_block_types"),
        ({"attention_head_dim": "many"}, "attention_head_dim is 'many'"),
        ({"sample_size": "large"}, "sample_size is 'large'"),
        ({"sample_size": [1, 2, 3]}, r"sample_size is \[1, 2, 3\]"),
    ],
)
def test_a_config_that_cannot_be_is_named(folder: Path, values: dict[str, object], said: str) -> None:
    set_config(folder, **values)
    with pytest.raises(FlagError, match=f"unet/config.json: {said}"):
        read_folder(str(folder))


def test_what_a_config_leaves_out_is_what_diffusers_takes(folder: Path) -> None:
    set_config(folder, attention_head_dim="absent")
    assert read_folder(str(folder)).heads == (8,)
    (folder / "unet" / "config.json").write_text("{}")
    record, network = read_folder(str(folder)), signature(diffusers.UNet2DConditionModel).parameters
    assert (record.levels, record.heads) == (
        len(network["down_block_types"].default),
        (network["attention_head_dim"].default,),
    )
