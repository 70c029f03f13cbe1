"""What each process of a bench runs: it loads one strategy, and then makes an image whenever it is asked to.

    python -m otil_xdit.tools.bench.worker SOCKET NAME      (with torchrun's RANK, WORLD_SIZE, MASTER_ADDR, ...)

It is asked through a Unix socket by `otil_xdit.tools.bench.jobs`, which works from any network namespace, and which
stops it by a signal between two questions. When whoever asks is gone, it ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from otil_xdit.tools.bench.protocol import Answer, GatherTask, ImageTask

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl.h."""

PROMPT = "a large red circle on the left and a small blue square on the right, striped background"


def main() -> None:
    """Connect, load, and answer until nobody asks any more."""
    path, name = sys.argv[1:]
    rank = int(os.environ["RANK"])
    _end_with_parent()
    _pin(rank)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        connection = Connection(client.detach())
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # whoever asks has ended, so shall this
        connection.send((name, rank))
        _answer(connection)


def _end_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends: a stopped one would not see that."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _pin(rank: int) -> None:
    """Rank r to core r modulo the cores, before any library starts threads; not where a GPU computes."""
    if not os.path.exists("/dev/nvidia0") and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})


def _answer(connection: Connection) -> None:
    try:
        answer = _prepared(connection.recv())
        connection.send({})
        while True:
            connection.recv()
            connection.send(answer())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        from otil_xdit.tools.common.processes import last_line

        connection.send({"error": last_line(error)})
        raise


def _prepared(task: ImageTask | GatherTask) -> Callable[[], Answer]:
    """What answers a question, loaded."""
    from otil_xdit.tools.common.processes import take_device

    take_device()
    return _gathers(task) if isinstance(task, GatherTask) else _images(task)


def _images(task: ImageTask) -> Callable[[], Answer]:
    import torch
    import torch.distributed as dist

    from otil_xdit.tools.bench.networks import load, network_name, share_out
    from otil_xdit.tools.bench.plan import parse_strategy

    pipe = load(task.folder, task.sampler, task.width)
    watch = Stopwatch(pipe.device.type == "cuda")
    pipe = share_out(pipe, parse_strategy(task.strategy))
    getattr(pipe, network_name(pipe)).register_forward_pre_hook(lambda network, inputs: watch.begin())
    pipe.set_progress_bar_config(disable=True)
    session = vars(pipe).get("_otil_session")

    def image() -> Answer:
        if dist.is_initialized():
            dist.barrier()
        watch.reset()
        pipe(
            PROMPT,
            height=task.size,
            width=task.size,
            num_inference_steps=task.steps,
            guidance_scale=task.guidance,
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
        self._marks.clear()
        self._cpu_marks.clear()

    def begin(self) -> None:
        """Called before every call of the network; the first one counts."""
        if not self._marks:
            self._mark()

    def step(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """diffusers' `callback_on_step_end`."""
        self._mark()
        return tensors

    def seconds(self) -> list[float]:
        """Of each step, in order."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if not self._cuda:
            return [after - before for before, after in pairs]
        self._marks[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]

    def cpu_seconds(self) -> list[float] | None:
        """What the calling thread computed in each step, waiting and other ranks' turns on its core left out; None
        where a GPU computes."""
        if self._cuda:
            return None
        return [after - before for before, after in zip(self._cpu_marks, self._cpu_marks[1:], strict=False)]

    def _mark(self) -> None:
        if not self._cuda:
            self._marks.append(time.perf_counter())
            self._cpu_marks.append(time.thread_time())
            return
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)


def _gathers(task: GatherTask) -> Callable[[], Answer]:
    import torch
    import torch.distributed as dist

    from otil_xdit.comm.collectives import CollectiveLabel, Collectives
    from otil_xdit.comm.groups import PatchGroup

    dist.init_process_group("gloo")
    world, ranks = dist.group.WORLD, dist.get_world_size()
    assert world is not None, "the group has just been made"
    exchange = Collectives(PatchGroup(world, dist.get_rank(), ranks), timeout=300.0)

    def gathers() -> Answer:
        found = []
        for size in task.sizes:
            payload = torch.zeros(size, dtype=torch.uint8)
            everybody = payload.new_empty(ranks, size)
            label = CollectiveLabel("calibration", f"a gather of {size} bytes", None)
            seconds = []
            for _ in range(task.repeats):
                dist.barrier()
                started = time.perf_counter()
                exchange.all_gather(payload, everybody, label).wait()
                seconds.append(time.perf_counter() - started)
            found.append(seconds)
        return {"seconds": found}

    return gathers


if __name__ == "__main__":
    main()
