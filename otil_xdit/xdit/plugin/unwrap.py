"""Take xDiT's wrappers off a pipeline again: what `otil_xdit.restore` needs and xfuser 0.7.0 has not.

xDiT wraps a pipeline in an object of its own, and in place the pipeline's transformer, layers of it, and the scheduler.
"""

from __future__ import annotations

from typing import Any

from torch import nn

PARTS = ("transformer", "unet", "scheduler", "vae")
"""What `xFuserPipelineBaseWrapper.__init__` may put something else in the place of."""


def parts_of(pipeline: Any) -> dict[str, Any]:
    """Return a pipeline's parts that xDiT is about to wrap, by name."""
    return {name: getattr(pipeline, name) for name in PARTS if getattr(pipeline, name, None) is not None}


def processors_of(parts: dict[str, Any]) -> dict[nn.Module, Any]:
    """Return the attention processors of a pipeline's parts: for some networks xDiT replaces nothing else."""
    networks = [part for part in parts.values() if isinstance(part, nn.Module)]
    layers = [layer for network in networks for layer in network.modules()]
    return {layer: vars(layer)["processor"] for layer in layers if vars(layer).get("processor") is not None}


def unwrap(pipeline: Any, parts: dict[str, Any], processors: dict[nn.Module, Any]) -> None:
    """Give `pipeline` its parts back, and their layers theirs; what was loaded into these since (LoRA) stays.

    Args:
        pipeline: what xDiT has wrapped.
        parts: what `parts_of` returned before.
        processors: what `processors_of` returned before.
    """
    from xfuser.core.cache_manager.cache_manager import get_cache_manager
    from xfuser.model_executor.base_wrapper import xFuserBaseWrapper

    wrapped = set()
    for name, part in parts.items():
        if getattr(pipeline, name) is not part:
            setattr(pipeline, name, part)
        for module in [*part.modules()] if isinstance(part, nn.Module) else ():
            for key, child in module._modules.items():
                if isinstance(child, xFuserBaseWrapper) and not isinstance(module, xFuserBaseWrapper):
                    wrapped.add(child)
                    module._modules[key] = child.module
    for layer, processor in processors.items():
        vars(layer)["processor"] = processor
    cache = get_cache_manager().cache
    # xDiT's table of layers is never emptied and would keep the network alive.
    for entry in [entry for entry in cache if entry[1] in wrapped]:
        del cache[entry]
