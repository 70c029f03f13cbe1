"""``--patch_shares auto``: how many rows each patch of a U-Net gets, by how fast its card computes a step."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from otil_xdit.dryrun.flops import arguments_of
from otil_xdit.dryrun.memory_estimate import job_of
from otil_xdit.networks.offload import execution_device

logger = logging.getLogger("otil_xdit")

ROUNDS, ENOUGH_SECONDS = 3, 2.0
"""Steps that are timed, after one that is not; fewer where they take so long."""

EQUAL = 1.1
"""Cards whose times differ by less than this factor get equal patches: the same card varies by some percent."""

_UNIT = 10
"""The share of the slowest patch."""


def measure_shares(pipe: Any, ulysses_degree: int) -> tuple[int, ...]:
    """Time a step of the pipeline's U-Net on every rank that works on the image, and share rows out accordingly.

    Every rank calls this, once xDiT's groups exist and before the U-Net's layers are wrapped.

    Args:
        pipe: a diffusers pipeline around a U-Net.
        ulysses_degree: ranks that share the attention heads of a patch.

    Returns:
        A share for each patch, the same on all ranks; empty for equal ones.

    Raises:
        ValueError: where the pipeline does not tell how its U-Net is called.
    """
    from xfuser.core.distributed import parallel_state

    replica, rows = parallel_state.get_model_replica_group(), parallel_state.get_sp_group().world_size
    seconds: list[Any] = [None] * replica.world_size
    dist.all_gather_object(seconds, step_seconds(pipe), group=replica.cpu_group)
    # A patch is as fast as the slowest of the ranks that compute it; see `connect` for the order of the ranks.
    by_patch = [
        max(seconds[number] for number in range(replica.world_size) if number % rows // ulysses_degree == patch)
        for patch in range(rows // ulysses_degree)
    ]
    shares = shares_of(by_patch)
    if dist.get_rank() == 0:
        told = ", ".join(f"{one:.3f}" for one in by_patch)
        logger.info("--patch_shares auto: a step takes %s s; shares %s", told, shares or "equal")
    return shares


def shares_of(seconds: Sequence[float]) -> tuple[int, ...]:
    """Return shares of the rows that give patches which take `seconds` for equal work about the same time."""
    slowest = max(seconds)
    if slowest < EQUAL * min(seconds):
        return ()
    return tuple(round(_UNIT * slowest / one) for one in seconds)


def step_seconds(pipe: Any) -> float:
    """Return the seconds of a step of an image of the pipeline's own size on this rank alone.

    Raises:
        ValueError: where the pipeline does not tell how its U-Net is called.
    """
    network = getattr(pipe.unet, "_orig_mod", pipe.unet)
    device = execution_device(network) or torch.device("cpu")
    try:
        empty = arguments_of(job_of(pipe))
        given = tree_map_only(torch.Tensor, lambda one: torch.zeros(one.shape, dtype=one.dtype, device=device), empty)
        found = []
        with torch.no_grad():
            for _ in range(1 + ROUNDS):
                started = time.perf_counter()
                network(return_dict=False, **given)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                found.append(time.perf_counter() - started)
                if sum(found[1:]) > ENOUGH_SECONDS:
                    break
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"--patch_shares auto: how the U-Net of {type(pipe).__name__} is called is not known here ({error}); give "
            "shares by number, such as 3,2"
        ) from error
    return statistics.median(found[1:])
