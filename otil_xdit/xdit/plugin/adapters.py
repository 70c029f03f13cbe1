"""Adapters (LoRA) of a pipeline that xDiT has wrapped: loaded, switched and let go as if it were not.

xDiT puts objects of its own between a transformer and its layers, whose names files of LoRA do not know. So the layers
are put back for the time of each call, and what was loaded into them stays when xDiT's objects return.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

METHODS = (
    *("load_lora_weights", "unload_lora_weights", "set_adapters", "delete_adapters", "fuse_lora", "unfuse_lora"),
    *("enable_lora", "disable_lora", "set_lora_device", "get_active_adapters", "get_list_adapters"),
)
"""What diffusers' pipelines have for adapters."""


def take_adapters(wrapper: Any, parts: Mapping[str, Any]) -> None:
    """Give a wrapper the methods for adapters of the pipeline that it wraps.

    Args:
        wrapper: xDiT's, round a pipeline.
        parts: the pipeline's own by name, in whose place xDiT has put its own.
    """
    for name in METHODS:
        if callable(getattr(wrapper.module, name, None)):
            vars(wrapper)[name] = partial(_call_bare, wrapper.module, dict(parts), name)


def _call_bare(pipeline: Any, parts: Mapping[str, Any], name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a pipeline that has its own layers meanwhile.

    Raises:
        ValueError: for an adapter of a layer that xDiT computes itself; the adapters are let go.
    """
    replaced = []
    with _bare(pipeline, parts) as layers:
        made = getattr(pipeline, name)(*args, **kwargs)
        replaced = [key for holder, key, layer in layers if holder._modules[key] is not layer.module]
        if replaced:
            pipeline.unload_lora_weights()
    if replaced:
        raise ValueError(
            f"--parallel does not support an adapter of the layer {replaced[0]}, which xDiT computes itself; no "
            "adapter is loaded now: leave that layer out, or fuse and unload the adapter before parallelize"
        )
    return made


@contextmanager
def _bare(pipeline: Any, parts: Mapping[str, Any]) -> Iterator[list[tuple[nn.Module, str, Any]]]:
    """Put a pipeline's own parts and layers in the place of xDiT's; yield holder, name and xDiT's layer of each."""
    from xfuser.model_executor.base_wrapper import xFuserBaseWrapper

    wrapped = {name: getattr(pipeline, name) for name in parts if isinstance(parts[name], nn.Module)}
    layers = [
        (holder, key, child)
        for name in wrapped
        for holder in parts[name].modules()
        if not isinstance(holder, xFuserBaseWrapper)
        for key, child in holder._modules.items()
        if isinstance(child, xFuserBaseWrapper)
    ]
    try:
        for name in wrapped:
            setattr(pipeline, name, parts[name])
        for holder, key, layer in layers:
            holder._modules[key] = layer.module
        yield layers
    finally:
        for holder, key, layer in layers:
            holder._modules[key] = layer
        for name, part in wrapped.items():
            setattr(pipeline, name, part)
