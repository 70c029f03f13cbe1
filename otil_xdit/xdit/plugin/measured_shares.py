"""``--patch_shares auto``: how many rows or tokens each patch gets, by how fast its card computes.

A U-Net's step is timed. A transformer's ranks would need each other for one, so the layers of one of its blocks are.

Shapes: S tokens, H heads, d features of a head.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map_only

from otil_xdit.dryrun.flops import arguments_of
from otil_xdit.dryrun.memory_estimate import job_of
from otil_xdit.networks.offload import execution_device
from otil_xdit.networks.unet.model import is_unet
from otil_xdit.runtime.network_hooks import networks_of

logger = logging.getLogger("otil_xdit")

ROUNDS, ENOUGH_SECONDS = 3, 2.0
"""Steps that are timed, after one that is not; fewer where they take so long."""

EQUAL = 1.1
"""Cards whose times differ by less than this factor get equal patches: the same card varies by some percent."""

_UNIT = 10
"""The share of the slowest patch."""

_TOKENS, _HEAD = 2048, 64
"""Of the attention that is timed for a transformer: tokens, and features of a head."""


def measure_shares(pipe: Any, ulysses_degree: int) -> tuple[int, ...]:
    """Time the pipeline's network on every rank that works on the image, and share rows or tokens out accordingly.

    Every rank calls this, once xDiT's groups exist and before a U-Net's layers are wrapped.

    Args:
        pipe: a diffusers pipeline.
        ulysses_degree: ranks that share the attention heads of a patch.

    Returns:
        A share for each patch, the same on all ranks; empty for equal ones.

    Raises:
        ValueError: where what is to be timed cannot be called.
    """
    from xfuser.core.distributed import parallel_state

    replica, rows = parallel_state.get_model_replica_group(), parallel_state.get_sp_group().world_size
    seconds: list[Any] = [None] * replica.world_size
    dist.all_gather_object(seconds, step_seconds(pipe), group=replica.cpu_group)
    # A patch is as fast as the slowest of the ranks that compute it.
    by_patch = [
        max(seconds[number] for number in range(replica.world_size) if patch_of(number, rows, ulysses_degree) == patch)
        for patch in range(rows // ulysses_degree)
    ]
    shares = shares_of(by_patch)
    if dist.get_rank() == 0:
        told = ", ".join(f"{one:.3f}" for one in by_patch)
        logger.info("--patch_shares auto: what is timed takes %s s; shares %s", told, shares or "equal")
    return shares


def patch_of(number: int, rows: int, ulysses_degree: int) -> int:
    """Return the patch of a rank of the replica, by its number in it; see `otil_xdit.xdit.plugin.groups.connect`.

    Args:
        number: of the rank.
        rows: number of ranks that share the rows: patch x Ulysses.
        ulysses_degree: of them that share a patch.
    """
    return number % rows // ulysses_degree


def shares_of(seconds: Sequence[float]) -> tuple[int, ...]:
    """Return shares of the rows that give patches which take `seconds` for equal work about the same time."""
    slowest = max(seconds)
    if slowest < EQUAL * min(seconds):
        return ()
    return tuple(round(_UNIT * slowest / one) for one in seconds)


def step_seconds(pipe: Any) -> float:
    """Return the seconds that this rank alone takes: for a step of an image of the U-Net's own size, or a DiT's block.

    Raises:
        ValueError: where it cannot be called.
    """
    network = next(iter(networks_of(pipe).values()))
    device = execution_device(network) or torch.device("cpu")
    try:
        call = _step_of(pipe, network, device) if is_unet(network) else _block_of(network, device)
        with torch.no_grad():
            return _median_seconds(call, device)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"--patch_shares auto: how the {'U-Net' if is_unet(network) else 'transformer'} of {type(pipe).__name__} "
            f"is called is not known here ({error}); give shares by number, such as 3,2"
        ) from error


def _step_of(pipe: Any, network: nn.Module, device: torch.device) -> Callable[[], object]:
    """Return what computes a step of a U-Net."""
    empty = arguments_of(job_of(pipe))
    given = tree_map_only(torch.Tensor, lambda one: torch.zeros(one.shape, dtype=one.dtype, device=device), empty)
    return partial(network, return_dict=False, **given)


def _block_of(network: nn.Module, device: torch.device) -> Callable[[], object]:
    """Return what computes the linear layers of one of a transformer's blocks, and attention as wide as its tokens."""
    dtype: torch.dtype = getattr(network, "dtype", torch.float32)
    blocks = [module[0] for module in network.modules() if isinstance(module, nn.ModuleList) and len(module)]
    block = max(blocks, key=lambda one: sum(weight.numel() for weight in one.parameters()))
    layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
    inputs = {
        width: torch.zeros(1, _TOKENS, width, dtype=dtype, device=device)
        for width in {layer.in_features for layer in layers}
    }
    heads = max(layers[0].in_features // _HEAD, 1)
    query = torch.zeros(1, heads, _TOKENS, _HEAD, dtype=dtype, device=device)

    def compute() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])
        scaled_dot_product_attention(query, query, query)

    return compute


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return how long `call` takes, but the first time."""
    found = []
    for _ in range(1 + ROUNDS):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
        if sum(found[1:]) > ENOUGH_SECONDS:
            break
    return statistics.median(found[1:])
