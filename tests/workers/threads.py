"""Threads that call pipelines of one process, on the ranks of a torchrun; rank 0 prints a JSON line for each way.

    torchrun --standalone --nproc_per_node 2 tests/workers/threads.py

A line: on each rank, of each thread the error, or whether its image is the one that it makes alone.
"""

from __future__ import annotations

import copy
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from tests.workers.unet_session import image, pipeline  # noqa: E402

SEEDS = (1, 2, 3)


def main() -> None:
    otil_xdit.register()
    torch.set_num_threads(1)
    pipe = otil_xdit.parallelize(pipeline(), "sync")
    other = otil_xdit.parallelize(pipeline(), "sync")
    alone = [draw(pipe, seed) for seed in SEEDS]
    ways = {"one pipeline": [pipe] * 3, "two pipelines": [pipe, other, pipe], "copies": [pipe, shallow(pipe), pipe]}
    for way, pipes in ways.items():
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, together(pipes, alone))
        if dist.get_rank() == 0:
            print(json.dumps({"way": way, "ranks": ranks}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def together(pipes: list[Any], alone: list[torch.Tensor]) -> list[str | bool]:
    """Call every pipeline from a thread of its own, each begun when the one before is in its first step."""
    found: list[str | bool] = ["never came"] * len(pipes)
    begun = threading.Event()

    def run(at: int) -> None:
        try:
            made = draw(pipes[at], SEEDS[at], begun.set)
            found[at] = bool(torch.equal(made, alone[at]))
        except Exception as error:
            found[at] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(pipes))]
    for thread in threads:
        thread.start()
        begun.wait(30)
        time.sleep(0.2)  # the callers come in the same order on all ranks
    for thread in threads:
        thread.join()
    return found


def shallow(pipe: Any) -> Any:
    """A copy with a scheduler of its own, as servers make one for each request."""
    made = copy.copy(pipe)
    made.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return made


def draw(pipe: Any, seed: int, begun: Callable[[], None] = lambda: None) -> torch.Tensor:
    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        begun()
        return tensors

    generator = torch.Generator().manual_seed(seed)
    return image(pipe, steps=4, generator=generator, callback_on_step_end=step_end)


if __name__ == "__main__":
    main()
