"""What the ranks of a bench do: make an image, or time all-gathers, whenever they are asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from otil_xdit.comm.collectives import CollectiveLabel, Collectives
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.tools.bench.networks import load, network_name, share_out
from otil_xdit.tools.bench.plan import parse_strategy
from otil_xdit.tools.common.worker import Answer

PROMPT = "a large red circle on the left and a small blue square on the right, striped background"

GATHER_TIMEOUT = 300.0
"""Seconds that an all-gather over the slowest link may take."""


@dataclass(frozen=True)
class ImageTask:
    """An image, and the seconds of its steps.

    Attributes:
        strategy: its text, as `otil_xdit.tools.bench.plan.parse_strategy` takes it.
        folder: of the model, in diffusers format.
        width, size, sampler, steps, guidance: as in `otil_xdit.tools.bench.plan.Plan`.
    """

    strategy: str
    folder: str
    width: int
    size: int
    sampler: str
    steps: int
    guidance: float

    def load(self) -> Callable[[None], Answer]:
        """Return what makes an image: seconds of each step, and the session's report where there is one."""
        pipe = load(self.folder, self.sampler, self.width)
        watch = Stopwatch(pipe.device.type == "cuda")
        pipe = share_out(pipe, parse_strategy(self.strategy))
        getattr(pipe, network_name(pipe)).register_forward_pre_hook(lambda network, inputs: watch.begin())
        pipe.set_progress_bar_config(disable=True)
        session = vars(pipe).get("_otil_session")

        def image(question: None) -> Answer:
            if dist.is_initialized():
                dist.barrier()
            watch.reset()
            pipe(
                PROMPT,
                height=self.size,
                width=self.size,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
                callback_on_step_end=watch.step,
                callback_on_step_end_tensor_inputs=[],
            )
            report = None if session is None else session.report().to_dict()
            return {"step_seconds": watch.seconds(), "cpu_step_seconds": watch.cpu_seconds(), "report": report}

        return image


class Stopwatch:
    """Takes the time of each step of a denoising loop: from the network's first call to the end of the last step."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._marks: list[Any] = []
        self._cpu_marks: list[float] = []

    def reset(self) -> None:
        """Forget the last loop."""
        self._marks.clear()
        self._cpu_marks.clear()

    def begin(self) -> None:
        """Mark the first call of the network; called before every one."""
        if not self._marks:
            self._mark()

    def step(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Mark the end of a step; diffusers' `callback_on_step_end`."""
        self._mark()
        return tensors

    def seconds(self) -> list[float]:
        """Return the seconds of each step, in order."""
        if not self._cuda:
            return _between(self._marks)
        self._marks[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._marks)]

    def cpu_seconds(self) -> list[float] | None:
        """Return what the calling thread computed in each step, in seconds; None where a GPU computes.

        Waiting, and other ranks' turns on its core, are left out.
        """
        return None if self._cuda else _between(self._cpu_marks)

    def _mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())
            self._cpu_marks.append(time.thread_time())


def _between(marks: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(marks)]


@dataclass(frozen=True)
class GatherTask:
    """All-gathers of several sizes, and their seconds.

    Attributes:
        sizes: of one rank's payload, in bytes.
        repeats: all-gathers of each size.
    """

    sizes: tuple[int, ...]
    repeats: int

    def load(self) -> Callable[[None], Answer]:
        """Return what times the all-gathers: ``seconds`` has a list of `repeats` for each size."""
        dist.init_process_group("gloo")
        world = dist.group.WORLD
        assert world is not None, "the group has just been made"
        group = PatchGroup(world, dist.get_rank(), dist.get_world_size())
        collectives = Collectives(group, timeout=GATHER_TIMEOUT)
        return lambda question: {"seconds": [self._gathers(collectives, group.world_size, size) for size in self.sizes]}

    def _gathers(self, collectives: Collectives, ranks: int, size: int) -> list[float]:
        payload = torch.zeros(size, dtype=torch.uint8)
        gathered = payload.new_empty(ranks, size)
        label = CollectiveLabel("calibration", f"a gather of {size} bytes", None)
        seconds = []
        for _ in range(self.repeats):
            dist.barrier()
            started = time.perf_counter()
            collectives.all_gather(payload, gathered, label).wait()
            seconds.append(time.perf_counter() - started)
        return seconds
