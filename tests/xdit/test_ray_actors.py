"""Actors of Ray: the plugin's entry point registers it there, and xDiT's `RayDiffusionPipeline` runs strategies.

An environment of its own: pip install ray; OMP_NUM_THREADS=1 python -m pytest -n0 -m slow tests/xdit/test_ray_actors.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

ray = pytest.importorskip("ray", reason="needs Ray: pip install ray")

from otil_xdit.catalog.bundled import model_folder  # noqa: E402
from otil_xdit.xdit.launcher.processes import free_port  # noqa: E402
from otil_xdit.xdit.plugin.register import register  # noqa: E402
from tests.support.ray_actors import OnCpu, Registrar  # noqa: E402
from tests.support.torchrun import lines_of  # noqa: E402

pytestmark = pytest.mark.slow

ACTORS = 2
STRATEGIES = ("sync", "otil")
EXACT = 1e-4
"""Latents have unit scale; float32 sums in another order differ by about 1e-6 a step."""
LOADED: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None, "torch_dtype": torch.float32}
CALL = {"prompt": "a large red circle on the left, striped background", "height": 128, "width": 128}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine; what it counts as GPUs are places for the actors of each test, which have gloo here."""
    register()
    root = str(Path(__file__).resolve().parents[2])
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", **addresses}
    # xDiT cannot be imported without an accelerator; the hook mends that, and does not register the plugin.
    hook = {"worker_process_setup_hook": "otil_xdit.xdit.cpu.enable_cpu_ranks"}
    places = ACTORS * len(STRATEGIES)
    kind = {"include_dashboard": False, "_system_config": {"worker_niceness": 0}}  # Ray would have 15
    ray.init(num_cpus=4, num_gpus=places, runtime_env={"env_vars": variables, **hook}, **kind)
    yield
    ray.shutdown()


def latents(pipe: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    return pipe(**CALL, guidance_scale=4.0, num_inference_steps=10, generator=generator, output_type="latent")


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    pipe = StableDiffusion3Pipeline.from_pretrained(model_folder("tiny-dit"), **LOADED)
    pipe.set_progress_bar_config(disable=True)
    return latents(pipe).images


def test_an_actor_that_loads_the_entry_point_is_registered(cluster: None) -> None:
    actor = ray.remote(Registrar).remote()
    found = ray.get(actor.registered.remote("otil"), timeout=300)
    ray.kill(actor)
    assert found == {"xfuser before": False, "marked": True, "attention is hooked": True}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_actors_draw_what_the_ranks_of_a_torchrun_do(cluster: None, reference: torch.Tensor, strategy: str) -> None:
    made = drawn(strategy)
    error = (made - reference).abs().max().item()
    print(f"{strategy}: {error:.1e} of {reference.abs().max().item():.1f}")
    assert made.shape == reference.shape
    if strategy == "sync":
        assert error <= EXACT
    else:
        torchrun = lines_of(ACTORS, "tiny_dit.py")[-1][strategy]["max_error"]
        assert error == pytest.approx(torchrun, abs=EXACT) and error > 10 * EXACT


def drawn(strategy: str) -> torch.Tensor:
    """What `RayDiffusionPipeline` draws on two actors that nothing but the config registers."""
    from xfuser import xFuserArgs
    from xfuser.ray.pipeline.pipeline_utils import RayDiffusionPipeline

    folder = str(model_folder("tiny-dit"))
    arguments = xFuserArgs(model=folder, parallel=strategy, patch_degree=ACTORS, use_ray=True, ray_world_size=ACTORS)
    engine_config, _ = arguments.create_config()
    engine_config.runtime_config.dtype = torch.float32
    pipe = RayDiffusionPipeline.from_pretrained(OnCpu, folder, engine_config=engine_config, **LOADED)
    try:
        outputs = [one for one in latents(pipe) if one is not None]
    finally:
        for worker in pipe.workers:
            ray.kill(worker)
    assert len(outputs) == 1, "the last rank has the images"
    return outputs[0]
