"""U-Nets in xDiT's registries, its runtime state and its runner."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import otil_xdit
from otil_xdit.catalog.bundled import BUNDLED_UNETS, model_folder
from otil_xdit.catalog.pipelines import REFUSED, SUPPORTED, check_unet_pipeline
from otil_xdit.catalog.unets import UNETS, read_folder
from otil_xdit.xdit.launcher.runner_registry import model_registry
from otil_xdit.xdit.models.pipelines import wrapper_class
from otil_xdit.xdit.models.unets import register_folder, source_of
from tests.support.tiny_folder import PIXELS, save_tiny_sd
from tests.support.unets import build_unet, pipeline_around

DEADLINE = 240


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    otil_xdit.register()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sd(tmp_path_factory.mktemp("pipelines") / "my-sd")


@pytest.mark.parametrize("record", UNETS, ids=lambda record: record.label)
def test_every_name_of_a_unet_is_in_the_registry(record) -> None:
    found = {model_registry()[name] for name in record.names}
    (model,) = found
    defaults = model.default_input_values
    assert (defaults.height, defaults.width) == (record.height, record.width)
    assert (defaults.guidance_scale, defaults.num_inference_steps) == (record.guidance, record.steps)
    can = model.capabilities
    for flag in ("ulysses_degree", "ring_degree", "data_parallel_degree", "use_cfg_parallel", "use_parallel_vae"):
        assert getattr(can, flag), flag
    for flag in ("pipefusion_parallel_degree", "tensor_parallel_degree", "fully_shard_degree", "use_fp8_comms"):
        assert not getattr(can, flag), flag


def test_a_full_name_loads_that_repository() -> None:
    record = next(record for record in UNETS if record.label == "SD1.5")
    assert source_of("SD1.5", record) == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert source_of("runwayml/stable-diffusion-v1-5", record) == "runwayml/stable-diffusion-v1-5"


@pytest.mark.parametrize("name", BUNDLED_UNETS)
def test_what_is_known_of_a_shipped_model_is_what_its_folder_says(name: str) -> None:
    known = next(record for record in UNETS if record.label == name)
    said = read_folder(model_folder(name))
    for fact in ("pipeline", "vae", "levels", "heads", "height", "width"):
        assert getattr(said, fact) == getattr(known, fact), fact


def test_a_folder_is_registered_under_its_path(folder: Path) -> None:
    register_folder(str(folder))
    model = model_registry().pop(str(folder))
    assert model.settings.model_name == str(folder) and model.settings.output_name == "my_sd"
    assert model.default_input_values.height == PIXELS
    size = len(model_registry())
    register_folder("no/such/folder")
    register_folder("tiny-sd")
    assert len(model_registry()) == size


def pipeline_of(kind: type, unet: torch.nn.Module) -> Any:
    """An object of that class with nothing but a U-Net."""
    pipe = object.__new__(kind)
    vars(pipe)["unet"] = unet
    return pipe


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    return build_unet("sd1.5")


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_pipelines_pass(name: str, unet: torch.nn.Module) -> None:
    kind = getattr(diffusers, name)
    check_unet_pipeline(pipeline_of(kind, unet))
    check_unet_pipeline(pipeline_of(type("Mine", (kind,), {}), unet))


@pytest.mark.parametrize("name", [*REFUSED, "StableDiffusionPipelineSafe"])
def test_other_pipelines_are_refused_by_name(name: str, unet: torch.nn.Module) -> None:
    kind = getattr(diffusers, name)
    reason = REFUSED.get(name, "how it calls its U-Net has not been checked")
    with pytest.raises(ValueError, match=f"^{name} does not run on patches: {reason}; supported are Stable") as caught:
        check_unet_pipeline(pipeline_of(kind, unet))
    assert "\n" not in str(caught.value)


def test_another_network_is_refused() -> None:
    pipe = pipeline_of(diffusers.StableDiffusionPipeline, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="its unet is Linear, not UNet2DConditionModel"):
        check_unet_pipeline(pipe)


def test_xdit_finds_our_wrapper_and_its_own_class_has_become_it() -> None:
    register = importlib.import_module("xfuser.model_executor.pipelines.register").xFuserPipelineWrapperRegister
    for name in SUPPORTED:
        assert register.get_class(getattr(diffusers, name)) is wrapper_class(), name
    assert register.get_class(diffusers.StableDiffusion3Pipeline) is not wrapper_class()
    theirs = importlib.import_module("xfuser").xFuserStableDiffusionXLPipeline
    assert theirs.__init__ is wrapper_class().__init__ and theirs.__call__ is wrapper_class().__call__


def test_our_wrapper_converts_nothing_and_passes_calls_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline_around(build_unet("sd1.5"))
    unet, scheduler = pipe.unet, pipe.scheduler
    made, calls = [], []
    monkeypatch.setattr(
        wrapper_class(), "_init_runtime_state", lambda self, pipeline, engine_config: made.append(pipeline)
    )
    config = SimpleNamespace(
        runtime_config=SimpleNamespace(use_parallel_vae=False), parallel_config=SimpleNamespace(world_size=1)
    )
    wrapped = wrapper_class()(pipe, config)
    assert made == [pipe] and wrapped.module is pipe
    assert wrapped.unet is unet and wrapped.scheduler is scheduler and pipe.unet is unet
    monkeypatch.setattr(type(pipe), "__call__", lambda self, *args, **kwargs: calls.append((args, kwargs)))
    wrapped("a circle", height=64)
    assert calls == [(("a circle",), {"height": 64})]
    with pytest.raises(ValueError, match="StableDiffusionSAGPipeline does not run on patches"):
        wrapper_class()(pipeline_of(diffusers.StableDiffusionSAGPipeline, unet), config)


@pytest.mark.parametrize(
    ("degrees", "refused"),
    [
        ({"world_size": 8, "cfg_degree": 2}, ""),
        ({"world_size": 3}, ""),
        ({"pp_degree": 2}, "pipefusion_parallel_degree is 2, which a U-Net does not support .* give 1"),
        ({"tp_degree": 4}, "tensor_parallel_degree is 4, which a U-Net"),
        ({"vae_parallel_size": 1}, "vae_parallel_size is 1, which a U-Net .* give 0"),
    ],
)
def test_the_runtime_state_takes_any_ranks_but_not_every_degree(degrees: dict[str, int], refused: str) -> None:
    state = importlib.import_module("xfuser.core.distributed.runtime_state").UnetRuntimeState
    parallel = SimpleNamespace(
        **{"world_size": 1, "cfg_degree": 1, "pp_degree": 1, "tp_degree": 1, "vae_parallel_size": 0, **degrees}
    )
    unchecked = SimpleNamespace(parallel_config=parallel)
    if refused:
        with pytest.raises(ValueError, match=refused):
            state.sanity_check(unchecked)
    else:
        state.sanity_check(unchecked)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], marks=pytest.mark.slow, id="one process"),
        pytest.param(["--parallel", "sync", "--patch_degree", "2", "--use_parallel_vae"], id="two ranks"),
    ],
)
def test_a_folder_makes_the_image_that_diffusers_makes(flags: list[str], folder: Path, tmp_path: Path) -> None:
    """Through the launcher: prompts, negative prompt, scheduler and defaults get there, and the last rank saves."""
    prompts, negative, steps = ["a red circle", "a blue square"], "dots", 2
    done = subprocess.run(
        [sys.executable, "-m", "otil_xdit", "--model", str(folder), "--prompt", *prompts]
        + ["--negative_prompt", negative, "--scheduler", "dpm-solver", "--num_inference_steps", str(steps)]
        + ["--seed", "3", "--output_directory", str(tmp_path), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    plain = pipe(prompts, negative_prompt=[negative] * 2, num_inference_steps=steps, generator=torch.manual_seed(3))
    made = sorted(tmp_path.glob("my_sd_*.png"))
    assert len(made) == 2
    for path, image in zip(made, plain.images, strict=True):
        assert image.size == (PIXELS, PIXELS)
        difference = np.asarray(Image.open(path), np.int16) - np.asarray(image, np.int16)
        assert np.abs(difference).max() <= 1, "an image's last bit may round differently"
