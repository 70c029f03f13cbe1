"""Model offload of a network whose class is swapped: accelerate's hook must call the `forward` of its present class.

accelerate gives the network a `forward` of its own, which moves the weights to the device and calls the one that the
network had at that time. That may be older than the class which patches give it, or outlive it.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

WHOLE_NETWORK = ("CpuOffload",)
"""Hooks of accelerate that move a whole network before its call."""


def hook_names(module: nn.Module) -> list[str]:
    """Return the class names of accelerate's hooks on a module."""
    hook = vars(module).get("_hf_hook")
    return [type(one).__name__ for one in getattr(hook, "hooks", [hook] if hook is not None else [])]


def is_of_class(module: nn.Module, forward: Any) -> bool:
    """Tell whether `forward`, set on a module, is that of its class or of one that this class is derived from."""
    own = getattr(forward, "__func__", None)
    return any(own is vars(kind).get("forward") for kind in type(module).__mro__) if own is not None else False


def follow_class(network: nn.Module) -> None:
    """Let a network's hook, if it has one, call the `forward` of its present class; drop one that a hook left behind.

    To be called after each change of its class.
    """
    held = vars(network)
    if "_hf_hook" not in held:
        if _is_bound(network, held.get("forward")):
            del held["forward"]
    elif _is_bound(network, held.get("_old_forward")):
        held["_old_forward"] = MethodType(type(network).forward, network)


def execution_device(network: nn.Module) -> torch.device | None:
    """Return the device on which a network computes, wherever its weights are; None for one without weights."""
    device = getattr(vars(network).get("_hf_hook"), "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next((weight.device for weight in network.parameters()), None)


def _is_bound(network: nn.Module, forward: Any) -> bool:
    """Tell whether this is a method of the network itself, and no function that somebody has put in its place."""
    return getattr(forward, "__self__", None) is network and getattr(forward, "__name__", "") == "forward"
