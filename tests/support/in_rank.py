"""What the scripts that a torchrun runs have in common: how they begin, what they print, and leaving xDiT's groups."""

from __future__ import annotations

import gc
import json
import logging
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

import otil_xdit


def settle() -> None:
    """Register the plugin, and let this rank compute on one thread, without gradients and without a log."""
    otil_xdit.register()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    logging.disable(logging.WARNING)


def tell(case: Any, found: Any) -> None:
    """Print what all ranks have found of a case, as a JSON line of rank 0."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    if dist.get_rank() == 0:
        print(json.dumps({"case": case, "ranks": ranks}), flush=True)


def described(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    message = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {message} ({Path(last.filename).name}:{last.lineno})"


def leave_groups() -> None:
    """The next composition makes its own groups; xDiT makes none while it has some.

    xDiT keeps some of those that it made (for pipelines, Ulysses and rings). gloo wakes a thread of each a hundred
    times a second, which after some cases is all that a machine does: so everything but the groups of all ranks ends.
    """
    from xfuser.core.distributed import parallel_state

    gc.collect()
    if not parallel_state.model_parallel_is_initialized():
        return
    parallel_state.destroy_model_parallel()
    everybody = parallel_state.get_world_group()
    kept = (dist.group.WORLD, everybody.device_group, everybody.cpu_group)
    for group in list(distributed_c10d._world.pg_map):
        if all(group is not one for one in kept):
            dist.destroy_process_group(group)
