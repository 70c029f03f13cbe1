"""Whole images of one rank on fake CUDA tensors, through `otil_xdit.parallelize` and xDiT's own pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import otil_xdit
from otil_xdit import get_strategy
from otil_xdit.exchange.report import Report
from otil_xdit.method.coordinates import Coordinates
from otil_xdit.method.schedule import Clock
from otil_xdit.runtime import session as session_module
from otil_xdit.xdit.plugin import groups
from tests.support.fake_cuda.launches import LaunchCounter, Launches
from tests.support.fake_cuda.machine import DEVICE, join

FAKE = FakeTensorMode(allow_non_fake_inputs=True)
"""One for the whole process: what is kept from image to image is of it."""

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "sync": ("sync", {}),
    "naive": ("naive", {"warmup_steps": 1}),
    "distrifusion": ("distrifusion", {"warmup_steps": 1}),
    "otil-paper": ("otil-paper", {"warmup_steps": 1, "select": "kv-cosine"}),
    "compact-2bit": ("compact-2bit", {"warmup_steps": 1}),
    "otil": ("otil", {}),
    "otil warm-up": ("otil", {"warmup_steps": 4}),
    "otil waiting": ("otil", {"warmup_steps": 1, "fresh_share": 1.0}),
    "otil displaced": ("otil", {"warmup_steps": 1, "fresh_share": 0.0}),
    "otil refresh": ("otil", {"warmup_steps": 1, "fresh_share": 0.0, "refresh": 3}),
    "otil 2bit waiting": ("otil", {"warmup_steps": 1, "fresh_share": 1.0, "codec": "2bit"}),
    "otil 2bit displaced": ("otil", {"warmup_steps": 1, "fresh_share": 0.0, "codec": "2bit"}),
}
"""Strategies with a short warm-up, so that a few steps hold every kind of theirs; ``otil`` as what the fourth of its
steps is, too."""

STEPS = 5
"""A warm-up, the first step after it that finds nothing under way, and two more until moments are fitted."""


@dataclass(frozen=True)
class Scene:
    """One rank of an image.

    Attributes:
        pipeline: key of `tests.support.fake_cuda.pipelines.PIPELINES`.
        strategy: key of `STRATEGIES`; "plain" for the pipeline on one card alone.
        world_size, rank: of this process.
        dtype: of the network, as torch names it.
        ulysses, cfg: degrees; the rest of the ranks are patches.
        settings: of the strategy, besides its own.
    """

    pipeline: str
    strategy: str
    world_size: int = 2
    rank: int = 0
    dtype: str = "float16"
    ulysses: int = 1
    cfg: int = 1
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        degrees = "".join(f", {name} {n}" for name, n in (("ulysses", self.ulysses), ("cfg", self.cfg)) if n > 1)
        return f"{self.pipeline}, {self.strategy}, rank {self.rank} of {self.world_size}{degrees}, {self.dtype}"


def run(scene: Scene, steps: int = STEPS, again: int = 0) -> tuple[list[Launches], str, Report | None]:
    """Make an image on fake tensors, and another one of `again` steps if there are any.

    Returns:
        What each step asked of the device, the attention backend, and the report.
    """
    from tests.support.fake_cuda.pipelines import PIPELINES  # it imports diffusers' pipelines, after the machine

    made = PIPELINES[scene.pipeline]()
    put_on_device(made.pipe, getattr(torch, scene.dtype))
    join(scene.rank, scene.world_size)
    counter = LaunchCounter()
    try:
        with _stand_ins(), counter.watching_messages(), _steps(counter) as found:
            if scene.strategy == "plain":
                pipe = made.pipe
                pipe.scheduler.step = _then(pipe.scheduler.step, lambda: found.append(counter.take()))
            else:
                pipe = _parallelized(scene, made.pipe)
            with FAKE, torch.no_grad():
                call = made.call(getattr(torch, scene.dtype), DEVICE)
                with counter:
                    for count in filter(None, (steps, again)):
                        pipe(**call, num_inference_steps=count)
        return found, attention_backend(), None if scene.strategy == "plain" else otil_xdit.report(pipe)
    finally:
        leave()


def put_on_device(pipe: Any, dtype: torch.dtype) -> None:
    """Give a pipeline's modules fake parameters and buffers on the device, floating ones of that type."""
    for part in pipe.components.values():
        for module in part.modules() if isinstance(part, nn.Module) else ():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = _like(tensor, dtype)


def attention_backend() -> str:
    """Return xDiT's name of the attention backend that is used; empty without xDiT."""
    from xfuser.core.distributed import runtime_state

    return "" if runtime_state._RUNTIME is None else runtime_state._RUNTIME.attention_backend.name


def leave() -> None:
    """Let the next image have other ranks."""
    from xfuser.core.distributed import parallel_state, runtime_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state._WORLD = None
    runtime_state._RUNTIME = None
    dist.destroy_process_group()


def _like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with FAKE:
        made = torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device=DEVICE)
        return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def _parallelized(scene: Scene, pipe: Any) -> Any:
    name, settings = STRATEGIES[scene.strategy]
    strategy = get_strategy(name)
    config = strategy.make_config({**settings, **scene.settings})
    return otil_xdit.parallelize(
        pipe, strategy, config=config, ulysses_degree=scene.ulysses, use_cfg_parallel=scene.cfg > 1
    )


def _then(call: Callable[..., Any], follow: Callable[[], object]) -> Callable[..., Any]:
    """Return a function that calls `follow` after `call`."""

    @wraps(call)
    def both(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        follow()
        return result

    return both


@contextmanager
def _steps(counter: LaunchCounter) -> Iterator[list[Launches]]:
    """Take what was counted at each tick of the clock."""
    found: list[Launches] = []
    tick = Clock.tick
    Clock.tick = _then(tick, lambda: found.append(counter.take()))  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Clock.tick = tick  # type: ignore[method-assign]


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Leave out what needs other ranks' answers or real numbers: none of it is part of a step."""
    patched = {
        (groups, "_make_detector"): lambda *args: None,
        (session_module, "share_random_state"): lambda *args: None,
        (session_module, "facts_of_call"): lambda *args: {},
        (Coordinates, "digest"): 0,
    }
    before = {key: getattr(*key) for key in patched}
    for (module, name), stand_in in patched.items():
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)
