"""Step caches of a DiT: which ones patches can serve, and where they compare a step's tokens with those before.

A cache leaves blocks out at steps that hardly differ from the step before. Blocks that are left out send nothing, so
all ranks must leave out the same ones. Caches that count steps do so by themselves. Those that compare what the first
block makes of the tokens (First Block Cache), or its modulated input (TeaCache), would find another number on each
rank: here they are given the number of the whole image.

Shapes: B batch, S tokens of this rank, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn

from otil_xdit.catalog.architectures import Architecture

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From tokens of the step before and of this one, [B, S, C], the change over the size before, of the whole image."""

OF_DIFFUSERS = (
    *("fbc_leader_block_hook", "fbc_block_hook"),
    *("mag_cache_leader_block_hook", "mag_cache_block_hook"),
    *("pyramid_attention_broadcast", "taylorseer_cache"),
)
"""Hooks of diffusers' `enable_cache` that are served: the first compares tokens, the others count steps."""

_LEADER = "fbc_leader_block_hook"
_OF_XDIT = "xfuser.model_executor.cache."


@dataclass(frozen=True)
class StepCache:
    """One cache of a network.

    Attributes:
        says: its class and settings, the same on every rank.
        reset: empties it.
        places: objects, names of their methods that compare, and what makes such a method of a `Distance`.
    """

    says: str
    reset: Callable[[], object]
    places: tuple[tuple[Any, str, Callable[[Any, Distance], Callable[..., Any]]], ...]


def is_of_xdit(module: nn.Module) -> bool:
    """Return whether a module is a step cache of xDiT's round the blocks of a network."""
    return type(module).__module__.startswith(_OF_XDIT) and hasattr(module, "l1_distance")


def cache_of(network: nn.Module) -> StepCache | None:
    """Return a network's step cache, as `enable_cache` or xDiT's `apply_cache` has put it there; None for none."""
    for module in network.modules():
        if is_of_xdit(module):
            return _of_xdit(module)
    hooks = [
        (name, hook)
        for module in network.modules()
        for name, hook in getattr(vars(module).get("_diffusers_hook"), "hooks", {}).items()
        if name in OF_DIFFUSERS
    ]
    return _of_diffusers(network, hooks) if hooks else None


def check_cache(name: str, network: nn.Module, cache: StepCache, facts: Architecture, cfg_degree: int) -> None:
    """Check that a cache on patches decides what it would on one process.

    Args:
        name: the pipeline's attribute that holds the network.
        network: a DiT, or xDiT's wrapper of one.
        cache: of the network.
        facts: of its architecture.
        cfg_degree: ranks that share the passes with and without the prompt.

    Raises:
        ValueError: naming the network, the cache and the reason.
    """
    reason = ""
    if hasattr(network, "module_type"):
        reason = (
            "xDiT's wrapper of this pipeline shares its tokens out, and does not name the passes that caches tell apart"
        )
    elif not facts.step_caches:
        reason = "nobody has compared one on this architecture with one process"
    elif cfg_degree > 1:
        reason = "each half of the ranks has one pass of guidance, and a cache may decide for both at once"
    if reason:
        raise ValueError(f"--parallel does not support the step cache {cache.says} of the pipeline's {name}: {reason}")


@contextmanager
def comparing(cache: StepCache, distance: Distance) -> Iterator[None]:
    """Bracket a generation, in which a cache that begins empty compares the tokens of the whole image."""
    cache.reset()
    for holder, method, make in cache.places:
        vars(holder)[method] = make(holder, distance)
    try:
        yield
    finally:
        for holder, method, _ in cache.places:
            vars(holder).pop(method, None)


# ---- xDiT's ----------------------------------------------------------------------------------------------------------


def _of_xdit(blocks: Any) -> StepCache:
    says = f"{type(blocks).__name__}(rel_l1_thresh={float(blocks.rel_l1_thresh):g}, num_steps={blocks.num_steps})"

    def reset() -> None:
        state = blocks.cache_context
        for name in ("hidden_states_residual", "encoder_hidden_states_residual", "modulated_inputs"):
            setattr(state, name, None)
        for name in ("cnt", "accumulated_rel_l1_distance", "use_cache"):
            setattr(blocks, name, torch.zeros_like(getattr(blocks, name)))

    return StepCache(says, reset, ((blocks, "l1_distance", lambda _, distance: distance),))


# ---- diffusers' ------------------------------------------------------------------------------------------------------


def _of_diffusers(network: Any, hooks: list[tuple[str, Any]]) -> StepCache:
    config = getattr(network, "_cache_config", None)
    says = ", ".join(sorted({name for name, _ in hooks})) if config is None else _described(config)
    leaders = [hook for name, hook in hooks if name == _LEADER]

    def reset() -> None:
        for _, hook in hooks:
            for value in vars(hook).values():
                if hasattr(value, "_state_cache"):
                    value.reset()

    places = tuple((hook, "_should_compute_remaining_blocks", _should_compute) for hook in leaders)
    return StepCache(says, reset, places)


def _should_compute(hook: Any, distance: Distance) -> Callable[[torch.Tensor], bool]:
    """Return what decides for a head block's hook, from its residual, whether the other blocks are computed."""

    @torch.compiler.disable
    def should_compute(residual: torch.Tensor) -> bool:
        before = hook.state_manager.get_state().head_block_residual
        return before is None or bool(distance(before, residual) > hook.threshold)

    return should_compute


def _described(config: Any) -> str:
    """Return a cache's settings in words; functions among them have an address, which no two ranks share."""
    if not is_dataclass(config):
        return type(config).__name__
    values = {one.name: getattr(config, one.name) for one in fields(config)}
    told = ", ".join(f"{name}={value}" for name, value in values.items() if value is not None and not callable(value))
    return f"{type(config).__name__}({told})"
