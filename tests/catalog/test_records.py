"""One record is all that the rest of the package needs to know a model."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
from torch import nn

from otil_xdit.catalog import models, record
from otil_xdit.catalog.architectures import ARCHITECTURES, Architecture
from otil_xdit.catalog.dits import DITS, DitRecord
from otil_xdit.catalog.geometry import check_geometry
from otil_xdit.catalog.record import NetworkConfig
from otil_xdit.catalog.unets import UNETS, UnetRecord
from otil_xdit.dryrun.networks import attention_layers, find_network
from otil_xdit.hybridiff.staged_networks import check_stages
from otil_xdit.networks.dit.architectures import architecture_of, check_architecture
from otil_xdit.networks.dit.token_cut import TokenCut
from otil_xdit.tools import main as tools
from otil_xdit.xdit.launcher import main as launcher
from otil_xdit.xdit.models.unets import register_unet

MADE_UP_UNET = UnetRecord(
    names=("made-up-unet", "nobody/made-up-unet"),
    state="exact",
    note="made up",
    source="nobody/made-up-unet",
    pipeline="StableDiffusionPipeline",
    vae=8,
    levels=4,
    heads=(6,),
    height=448,
    width=320,
    guidance=3.0,
    steps=11,
    network=NetworkConfig(
        kind="UNet2DConditionModel",
        label="MADE-UP",
        settings={"block_out_channels": (60, 120, 240, 240), "norm_num_groups": 10, "attention_head_dim": 6},
    ),
)

MADE_UP_DIT = DitRecord(
    names=("nobody/Made-Up-DiT",),
    state="refused",
    note="it is made up",
    kind="SD3Transformer2DModel",
    vae=16,
    patch=4,
    height=1280,
    width=640,
)


NEW_KIND_OF_DIT = DitRecord(
    names=("nobody/New-DiT",),
    kind="NewTransformer2DModel",
    architecture=Architecture(rows=True, text="rear", stages=True),
    vae=8,
    patch=2,
    height=512,
    width=512,
)


@pytest.fixture
def with_made_up_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))
    models.register_model(MADE_UP_UNET)
    models.register_model(MADE_UP_DIT)


@pytest.mark.usefixtures("with_made_up_models")
def test_geometry_comes_from_the_record() -> None:
    check_geometry({"model": "made-up-unet"}, 3, 2, None)
    with pytest.raises(ValueError, match=r"--ulysses_degree 4 .* heads of made-up-unet \(6\); give 1 or 2 or 3 or 6"):
        check_geometry({"model": "nobody/made-up-unet"}, 1, 4, None)
    with pytest.raises(ValueError, match="--height 448 cannot be cut into 8 patches: made-up-unet is only 7 high"):
        check_geometry({"model": "made-up-unet"}, 8, 1, None)
    check_geometry({"model": "Made-Up-DiT"}, 3, 1, None)
    for height in (1300, 128):
        with pytest.raises(
            ValueError, match=rf"--height {height} .* give a multiple of 64 from 192 up \(64 pixels a token"
        ):
            check_geometry({"model": "nobody/made-up-dit", "height": height}, 3, 1, None)


@pytest.mark.usefixtures("with_made_up_models")
def test_the_tools_know_its_network_and_its_state(capsys: pytest.CaptureFixture[str]) -> None:
    network = find_network("MADE-UP")
    assert network.vae == 8 and network.module.config.norm_num_groups == 10
    assert {layer.heads for layer in attention_layers(network, 512, 512, TokenCut(2), 77)} == {6}
    launcher.model_registry()
    base_model = importlib.import_module("xfuser.model_executor.models.runner_models.base_model")
    register_unet(MADE_UP_UNET)
    try:
        assert tools.main(["models"]) == 0
        (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("made-up-unet "))
        assert row.split() == ["made-up-unet", "exact", "yes", "made", "up"]
        model = base_model.MODEL_REGISTRY["nobody/made-up-unet"]
        default = model.default_input_values
        assert (default.height, default.width, default.num_inference_steps) == (448, 320, 11)
    finally:
        for name in MADE_UP_UNET.names:
            base_model.MODEL_REGISTRY.pop(name, None)


@pytest.mark.usefixtures("with_made_up_models")
def test_a_refusal_comes_from_the_record() -> None:
    assert models.find_record("nobody/Made-Up-DiT") is MADE_UP_DIT and MADE_UP_DIT.refusal() == "it is made up"
    assert MADE_UP_DIT.cut == "rows" and DitRecord(names=("other",)).cut == "padded"


@pytest.mark.usefixtures("with_made_up_models")
def test_a_new_architecture_comes_from_the_record() -> None:
    network = type(NEW_KIND_OF_DIT.kind, (nn.Module,), {})()
    for check in (partial(check_architecture, "transformer"), check_stages):
        with pytest.raises(ValueError, match="NewTransformer2DModel"):
            check(network)
    models.register_model(NEW_KIND_OF_DIT)
    assert architecture_of(network) == NEW_KIND_OF_DIT.architecture and NEW_KIND_OF_DIT.cut == "rows"
    check_architecture("transformer", network)
    check_stages(network)
    with pytest.raises(ValueError, match=r"give a multiple of 48 \(16 pixels a token x 3 patches\)"):
        check_geometry({"model": "nobody/new-dit"}, 3, 1, None)


@pytest.mark.usefixtures("with_made_up_models")
def test_a_name_has_one_record() -> None:
    with pytest.raises(ValueError, match="'SDXL' is in the catalog already"):
        models.register_model(record.ModelRecord(names=("another", "SDXL")))
    assert models.register_model(MADE_UP_DIT) is MADE_UP_DIT


def test_names_are_told_apart() -> None:
    every = [name for known in (*UNETS, *DITS) for name in known.names]
    assert len(every) == len(set(every))
    assert all(models.find_record(name).is_named(name) for name in every)


def test_every_kind_with_a_cut_of_its_own_is_an_architecture_that_diffusers_has() -> None:
    diffusers = importlib.import_module("diffusers")
    kinds = {*ARCHITECTURES, *(known.kind for known in DITS if known.kind)}
    assert all(hasattr(diffusers, kind) for kind in kinds if not kind.startswith("xFuser"))
