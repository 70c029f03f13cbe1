"""The public names, and what `parallelize` refuses before it touches xfuser; the rest is in the workers' tests."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import otil_xdit
from otil_xdit import OtilConfig, Strategy, errors, get_strategy, strategies
from otil_xdit.catalog.architectures import ARCHITECTURES
from otil_xdit.catalog.numbers import CALL_NUMBERS, check_numbers
from otil_xdit.xdit.api import check_config, check_strategy
from otil_xdit.xdit.plugin import transformers
from tests.support.dits import CASES
from tests.support.unets.configs import build_unet
from tests.support.unets.pipelines import pipeline_around


@pytest.mark.parametrize("name", otil_xdit.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(otil_xdit, name).__name__ == name


def test_every_exception_is_public() -> None:
    exceptions = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert exceptions <= set(otil_xdit.__all__)


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, otil_xdit; assert 'xfuser' not in sys.modules and 'torch' not in sys.modules; "
        "assert not [name for name in sys.modules if name.startswith('otil_xdit.')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_package_says_that_it_is_typed() -> None:
    assert files("otil_xdit").joinpath("py.typed").is_file()


def test_a_strategy_is_a_name_or_a_strategy() -> None:
    mine = Strategy("mine", "", lambda given: OtilConfig())
    assert check_strategy("sync") is get_strategy("sync") and check_strategy(mine) is mine
    with pytest.raises(ValueError, match="no such strategy; choose from otil, otil-paper"):
        check_strategy("foo")


@pytest.mark.parametrize("shares", [None, -1, (3, -2), (0.6, 0.4), (True, 1), "3;2", (10**30, 1)])
def test_shares_are_numbers_or_auto(shares: Any) -> None:
    with pytest.raises(ValueError, match="patch_shares is '.*; give a whole number from 1 to 1000000 for each patch"):
        otil_xdit.parallelize(SimpleNamespace(), patch_shares=shares)


@pytest.mark.parametrize("strategy", [OtilConfig(), None, 3])
def test_anything_else_is_no_strategy(strategy: Any) -> None:
    message = f"strategy is {strategy!r}; give a Strategy or a name (settings are given as config=); choose from otil, "
    with pytest.raises(ValueError, match=re.escape(message)):
        otil_xdit.parallelize(SimpleNamespace(), strategy)


@pytest.mark.parametrize("config", ["sync", {"ratio": 0.5}, 3])
def test_anything_else_is_no_config(config: Any) -> None:
    message = f"config is {config!r}; give an OtilConfig, or None for the settings of strategy distrifusion"
    with pytest.raises(ValueError, match=re.escape(message)):
        otil_xdit.parallelize(SimpleNamespace(), "distrifusion", config)


@pytest.mark.parametrize("name", strategies())
def test_a_strategy_takes_its_own_settings(name: str, caplog: pytest.LogCaptureFixture) -> None:
    strategy = get_strategy(name)
    for given in ({}, {"timeout": 5.0}):
        made = strategy.make_config(given)
        with caplog.at_level(logging.WARNING):
            assert check_config(strategy, made) is made
    assert check_config(strategy, None) == strategy.make_config({})
    assert not caplog.records


def test_otil_takes_settings_of_all_kinds() -> None:
    for config in (OtilConfig(freshness="sync"), OtilConfig(ratio=0.5, codec="raw"), OtilConfig(window="2:5")):
        assert check_config(get_strategy("otil"), config) is config


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("sync", OtilConfig(), "freshness is 'displaced' and not 'sync'"),
        ("distrifusion", OtilConfig(warmup_steps=3), "fresh_share is 0.5 and not 0.0"),
        ("otil", OtilConfig(requires_cfg_parallel=True, window="auto"), "requires_cfg_parallel is True and not False"),
        ("hybridiff", OtilConfig(freshness="sync", window="auto"), "requires_cfg_parallel is False and not True"),
    ],
)
def test_settings_that_contradict_a_strategy_are_refused(name: str, config: OtilConfig, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        otil_xdit.parallelize(SimpleNamespace(), name, config)
    said = str(caught.value)
    assert said.startswith(f"config does not go with strategy {name}: ") and message in said
    assert said.endswith(f"give another strategy, or what get_strategy({name!r}).make_config({{...}}) returns")


def test_another_packages_settings_are_its_own_matter() -> None:
    class Settings:
        """Of another package."""

    mine, config = Strategy("mine", "", lambda given: Settings()), Settings()
    assert check_config(mine, config) is config
    with pytest.raises(ValueError, match="give a Settings, or None"):
        check_config(mine, OtilConfig())


@pytest.mark.parametrize("degree", [0, -1, 1.5, None, "2"])
def test_a_degree_is_a_whole_number(degree: Any) -> None:
    with pytest.raises(ValueError, match="ulysses_degree is .*; give a whole number from 1 up"):
        otil_xdit.parallelize(SimpleNamespace(), "sync", ulysses_degree=degree)


def test_without_torchrun_a_pipeline_runs_alone(caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline_around(build_unet("sd1.5"))
    assert otil_xdit.parallelize(pipe, "sync") is pipe
    assert "start it with torchrun" in caplog.text


def test_what_the_support_table_refuses_is_refused_here() -> None:
    with pytest.raises(ValueError, match="linear"):
        otil_xdit.parallelize(CASES["sana"].build(), "sync")


@pytest.mark.parametrize(
    ("owner", "attribute", "said"),
    [("pipe", "controlnet", "its ControlNet adds"), ("transformer", "encoder_hid_proj", "an IP-Adapter on the")],
)
def test_what_adds_to_a_transformers_layers_is_refused(owner: str, attribute: str, said: str) -> None:
    pipe = CASES["flux-kontext"].build()
    setattr(pipe if owner == "pipe" else pipe.transformer, attribute, torch.nn.Identity())
    with pytest.raises(ValueError, match=said):
        otil_xdit.parallelize(pipe, "sync")


@pytest.mark.parametrize(("case", "shares"), [("wan", False), ("qwen-image", False), ("z-image", True)])
def test_cfg_parallelism_that_xdit_has_not_is_refused(case: str, shares: bool) -> None:
    pipe = CASES[case].build()
    if shares:
        return transformers.check_cfg_parallel(pipe)
    with pytest.raises(ValueError, match=f"xDiT has no CFG parallelism for {type(pipe).__name__}; leave it out"):
        transformers.check_cfg_parallel(pipe)


@pytest.mark.parametrize("kind", transformers.RUNNER_TRANSFORMERS)
def test_xfuser_has_the_class_of_every_transformer(kind: str) -> None:
    otil_xdit.register()
    facts = transformers.RUNNER_TRANSFORMERS[kind]
    assert kind in [base.__name__ for base in facts.find().__mro__] and kind in ARCHITECTURES
    for pipeline, place in facts.pipelines.items():
        assert pipeline in [base.__name__ for base in transformers.pipeline_class(place).__mro__]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_inference_steps": -3}, "num_inference_steps is -3; give a whole number from 1 to 10000"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5; give a whole number"),
        ({"height": 0}, "height is 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; give a number from 0 to 1000"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"strength": 1.5}, "strength is 1.5; give a number from 0 to 1"),
    ],
)
def test_numbers_of_a_call_are_in_range(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_numbers(given, CALL_NUMBERS)


def test_numbers_in_range_and_what_is_no_number_pass() -> None:
    check_numbers({"height": 64, "width": None, "guidance_scale": 0, "eta": "x", "strength": True}, CALL_NUMBERS)


def test_a_pipeline_that_nobody_parallelized_has_a_summary_and_no_report() -> None:
    pipe = pipeline_around(build_unet("sd1.5"))
    assert otil_xdit.report(pipe) is None
    assert otil_xdit.summary(pipe) == f"one rank: {type(pipe).__name__} runs whole, nothing is exchanged"


@pytest.mark.parametrize("fused", [False, True], ids=["loaded", "fused"])
def test_a_transformer_with_adapters_is_refused_in_words(fused: bool) -> None:
    from diffusers import DiffusionPipeline
    from peft import LoraConfig

    from otil_xdit.catalog.bundled import absent_parts, model_folder

    folder = model_folder("tiny-dit")
    pipe = DiffusionPipeline.from_pretrained(folder, **absent_parts(folder))
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    if fused:
        pipe.fuse_lora()
    with pytest.raises(
        ValueError, match=r"call pipe.fuse_lora\(\) and pipe.unload_lora_weights\(\) before parallelize"
    ):
        otil_xdit.parallelize(pipe)
