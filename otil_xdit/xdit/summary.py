"""What was done to a pipeline, and what its last image cost: `report` and `summary`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from otil_xdit.exchange.report import Report
from otil_xdit.runtime.summary import LayerKind, Summary
from otil_xdit.xdit.plugin.sessions import session_of

_LAYERS: dict[LayerKind, str] = {
    "attention": "attention layers (keys and values)",
    "convolution": "convolutions (halo rows)",
    "group norm": "group norms (moments)",
    "self-attention": "self-attentions (keys and values)",
}
"""What layers of a kind are called, and what they exchange."""


def report(pipe: Any) -> Report | None:
    """Return what this rank sent and waited for in the last image.

    Args:
        pipe: what `parallelize` returned.

    Returns:
        The counters of the last generation; None for a pipeline that exchanges nothing, such as any on one rank.
    """
    session = session_of(pipe)
    return None if session is None else session.report()


def summary(pipe: Any) -> str:
    """Describe what `parallelize` did to a pipeline, in at most ten lines.

    Args:
        pipe: what `parallelize` returned.

    Returns:
        Strategy, degrees, the layers that exchange something by kind, this rank's buffers, and what every rank
        computes whole. On one rank it says that nothing is exchanged.
    """
    session = session_of(pipe)
    inner = vars(pipe).get("module", pipe)
    name = type(inner).__name__
    if session is None:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        where = "one rank" if ranks == 1 else "no patches and no CFG parallelism"
        return f"{where}: {name} runs whole, nothing is exchanged"
    made = session.summary(inner)
    lines = [
        f"pipeline: {name}",
        f"strategy: {made.strategy}",
        f"ranks of an image: {made.patch_degree} patches x {made.ulysses_degree} Ulysses x {made.cfg_degree} CFG",
        *(f"{part}: {_layers(counts)}" for part, counts in made.layers.items()),
        f"buffers: {_buffers(made)}",
        f"whole on every rank: {', '.join(made.whole) or 'nothing'}",
    ]
    return "\n".join(lines)


def _layers(counts: Mapping[LayerKind, int]) -> str:
    return ", ".join(f"{counts[kind]} {text}" for kind, text in _LAYERS.items() if counts.get(kind))


def _buffers(made: Summary) -> str:
    if not made.steps:
        return "none yet, the first image makes them"
    return f"{made.buffer_bytes / 1e6:.1f} MB on this rank after an image of {made.steps} steps"
