"""Running a case: in one process with diffusers, or on the ranks of a torchrun with xDiT."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from PIL import Image

import otil_xdit
from otil_xdit.xdit.cpu import ModuleView
from tests.support.dits.case import Case, Degrees
from tests.support.dits.exchanges import Exchange
from tests.support.dits.networks import Loop

SIZES = ("height", "width", "num_frames", "num_inference_steps")
LOADERS = "xfuser.model_executor.models.runner_models"


@torch.no_grad()
def run_plain(case: Case) -> torch.Tensor:
    """The final latents of diffusers in one process."""
    pipe = case.build()
    pipe.set_progress_bar_config(disable=True)
    return pipe(**case.arguments())[0]


@torch.no_grad()
def run_xdit(case: Case, folder: Path, degrees: Degrees, exchange: Exchange) -> torch.Tensor | None:
    """The final latents of xDiT, on the ranks that have them; `folder` holds the saved pipeline.

    All ranks call it; it leaves the process groups for the next case with the same degrees.
    """
    case.prepare()
    if case.network is None:
        allow_missing_encoders(folder)
    run = _run_network if case.network else _run_runner if case.runner else _run_wrapper
    with exchange.active():
        latents = run(case, folder, [*xdit_flags(case, degrees, exchange), *_image_flags(case, folder)])
    assert active_degrees() == degrees, f"xDiT ran {active_degrees()}, not {degrees}"
    return latents


@torch.no_grad()
def run_parallelized(case: Case, degrees: Degrees, exchange: Exchange, reference: torch.Tensor) -> torch.Tensor | None:
    """The final latents of what `otil_xdit.parallelize` makes of the pipeline, on the ranks that have them.

    `otil_xdit.restore` must give back what computes `reference` bit for bit.
    """
    pipe = case.build()
    pipe.set_progress_bar_config(disable=True)
    with exchange.active():
        made = otil_xdit.parallelize(
            pipe,
            "sync",
            ulysses_degree=degrees.ulysses,
            use_cfg_parallel=degrees.cfg > 1,
            patch_shares=exchange.shares(degrees),
        )
        try:
            output = made(**case.arguments())
        finally:
            restored = otil_xdit.restore(made)
    assert active_degrees() == degrees, f"xDiT ran {active_degrees()}, not {degrees}"
    assert restored is pipe and torch.equal(pipe(**case.arguments())[0], reference), "restore has changed the pipeline"
    return output[0] if output is not None and isinstance(output[0], torch.Tensor) else None


def active_degrees() -> Degrees:
    """How xDiT has shared out the ranks."""
    from xfuser.core.distributed import parallel_state

    return Degrees(
        patch=parallel_state.get_ring_parallel_world_size(),
        ulysses=parallel_state.get_ulysses_parallel_world_size(),
        cfg=parallel_state.get_classifier_free_guidance_world_size(),
    )


def xdit_flags(case: Case, degrees: Degrees, exchange: Exchange) -> list[str]:
    sizes = {key: value for key, value in case.call.items() if key in SIZES}
    flags = ["--model", case.runner or case.name, "--prompt", "a prompt", "--warmup_calls", "0"]
    flags += ["--ulysses_degree", str(degrees.ulysses), *exchange.flags(degrees), *case.runner_flags]
    flags += ["--use_cfg_parallel"] if degrees.cfg > 1 else []
    return flags + [word for key, value in sizes.items() for word in (f"--{key}", str(value))]


def _image_flags(case: Case, folder: Path) -> list[str]:
    """An image that xDiT's command line asks for; the case's own takes its place."""
    if not case.edits:
        return []
    image = folder / f"image{dist.get_rank()}.png"
    Image.new("RGB", (128, 128)).save(image)
    return ["--input_images", str(image)]


def _parsed(flags: list[str]) -> dict[str, Any]:
    from xfuser.config import FlexibleArgumentParser, xFuserArgs

    return vars(xFuserArgs.add_runner_args(FlexibleArgumentParser(allow_abbrev=False)).parse_args(flags))


def loaded_runner(case: Case, folder: Path, flags: list[str]) -> tuple[Any, dict[str, Any]]:
    """xDiT's runner with the pipeline of `folder`, in float32, and its arguments."""
    from xfuser.runner import MODEL_REGISTRY, xFuserModelRunner

    assert case.runner is not None, "it has a runner"
    model_class = MODEL_REGISTRY[case.runner]
    model_class.settings = replace(model_class.settings, model_name=str(folder))
    _load_in_float32(model_class)
    arguments = _parsed(flags)
    runner = xFuserModelRunner(arguments)
    runner.model.settings.model_name = str(folder)  # some models set it when they are made
    arguments = runner.preprocess_args(arguments)
    runner.initialize(arguments)
    runner.model.pipe.set_progress_bar_config(disable=True)
    return runner, arguments


def _run_runner(case: Case, folder: Path, flags: list[str]) -> torch.Tensor:
    runner, arguments = loaded_runner(case, folder, flags)
    runner.model.pipe = LatentsOf(runner.model.pipe, case)
    output, _ = runner.run(arguments)
    latents = output.images or output.videos
    return latents[0] if latents else None


def _load_in_float32(model_class: type) -> None:
    """Runners load in bfloat16, by name; this view of torch calls float32 so."""
    for name in (model_class.__module__, f"{LOADERS}.loading.transformer_load"):
        module = importlib.import_module(name)
        module.torch = ModuleView(module.torch, bfloat16=torch.float32, float16=torch.float32)


class LatentsOf:
    """Stands before a runner's pipeline: adds the case's arguments to a call and keeps the latents as they are."""

    def __init__(self, pipe: Any, case: Case) -> None:
        self._pipe = pipe
        self._case = case

    def __call__(self, **arguments: Any) -> SimpleNamespace:
        output = self._pipe(**{**arguments, **self._case.arguments(), "return_dict": False})
        latents = [] if output is None else [output[0]]
        return SimpleNamespace(images=latents, frames=latents)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def _run_wrapper(case: Case, folder: Path, flags: list[str]) -> torch.Tensor | None:
    import xfuser

    engine_config, _ = xfuser.xFuserArgs.from_runner_args(_parsed(flags)).create_config()
    engine_config.runtime_config.dtype = torch.float32
    pipe = getattr(xfuser, case.wrapper).from_pretrained(folder, engine_config=engine_config, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(**case.arguments(), return_dict=False)
    return output[0] if output is not None and isinstance(output[0], torch.Tensor) else None


def _run_network(case: Case, folder: Path, flags: list[str]) -> torch.Tensor:
    from xfuser import xFuserArgs
    from xfuser.core import distributed

    engine_config, _ = xFuserArgs.from_runner_args(_parsed(flags)).create_config()
    network = case.network().from_pretrained(folder / "transformer", torch_dtype=torch.float32).eval()
    pipe = Loop(network)
    distributed.initialize_runtime_state(pipe, engine_config)
    if hasattr(network, "_init_sp_state"):  # as Ideogram 4's runner does
        network._init_sp_state()
    return pipe(**case.arguments())[0]


def allow_missing_encoders(folder: Path) -> None:
    """The zoo's pipelines are saved without text encoders, which diffusers allows for optional components only."""
    index = json.loads((folder / "model_index.json").read_text())
    pipeline_class = getattr(diffusers, index["_class_name"])
    missing = {name for name, value in index.items() if value == [None, None]}
    pipeline_class._optional_components = sorted(missing.union(pipeline_class._optional_components))
