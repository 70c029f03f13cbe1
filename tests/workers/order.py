"""Two pipelines of one process, called in different order on two ranks, by one thread each; rank 0 prints a JSON line.

    torchrun --standalone --nproc_per_node 2 tests/workers/order.py

``first``: on each rank, of each pipeline whether its image is the one that it makes alone, or the error;
``afterwards``: the same when both are called in the same order again. ``missed``: of a pipeline that rank 1 calls too
late, a call that both make, one that rank 0 alone makes, and one that both make.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit import OtilConfig  # noqa: E402
from tests.workers.unet_session import image, pipeline  # noqa: E402

WAIT = 1.0


def main() -> None:
    otil_xdit.register()
    torch.set_num_threads(1)
    pipes = [otil_xdit.parallelize(pipeline(), "sync") for _ in range(2)]
    alone = [draw(pipe) for pipe in pipes]
    order = (0, 1) if dist.get_rank() == 0 else (1, 0)
    began = time.monotonic()
    first = together(pipes, alone, order)
    seconds = time.monotonic() - began
    afterwards = [compared(pipe, image) for pipe, image in zip(pipes, alone, strict=True)]
    missed = not_together()
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (first, afterwards, missed))
    if dist.get_rank() == 0:
        first, afterwards, missed = zip(*ranks, strict=True)
        line = {"first": first, "afterwards": afterwards, "missed": missed, "seconds": seconds}
        print(json.dumps(line), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def together(pipes: list[Any], alone: list[torch.Tensor], order: tuple[int, ...]) -> list[str | bool]:
    """Call the pipelines from threads that come in this order; what each gave, in the pipelines' own order."""
    found: dict[int, str | bool] = {}
    threads = []
    for at in order:
        threads.append(threading.Thread(target=lambda at=at: found.update({at: compared(pipes[at], alone[at])})))
        threads[-1].start()
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    return [found[at] for at in range(len(pipes))]


def not_together() -> list[str | bool]:
    """Make calls of another pipeline that rank 1 makes late, or not at all; what each gave on this rank."""
    pipe, is_first = otil_xdit.parallelize(pipeline(), config=OtilConfig(timeout=WAIT)), dist.get_rank() == 0
    alone = draw(pipe)
    if not is_first:
        time.sleep(1.5 * WAIT)
    found = [compared(pipe, alone, seed=2), compared(pipe, alone)]
    if is_first:
        found.append(compared(pipe, alone))
    else:
        time.sleep(1.5 * WAIT)
    return [*found, compared(pipe, alone)]


def compared(pipe: Any, alone: torch.Tensor, seed: int = 1) -> str | bool:
    """Whether the image is the one made alone; or the error, without the advice at its end."""
    try:
        return bool(torch.equal(draw(pipe, seed), alone))
    except Exception as error:
        return re.split(", which|; nothing", f"{type(error).__name__}: {error}")[0]


def draw(pipe: Any, seed: int = 1) -> torch.Tensor:
    return image(pipe, steps=2, generator=torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    main()
