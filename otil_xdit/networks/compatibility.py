"""Find what others have done to a network that patches cannot serve, by a look at each module, and refuse it by name.

Step caches, token merging, offloading and quantisation change a network's modules, often after it was parallelized, and
then every rank would compute something else than one device does. So each generation begins with a look at all of them
that must cost little: about a millisecond for SDXL's 1900 modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from inspect import signature
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from otil_xdit.networks.dit.step_cache import OF_DIFFUSERS, is_of_xdit
from otil_xdit.networks.offload import WHOLE_NETWORK, hook_names, is_of_class
from otil_xdit.networks.origins import (
    KNOWN_PACKAGES,
    ModuleKind,
    described_function,
    home_of,
    package_of,
    package_of_class,
)
from otil_xdit.networks.quantised import quantises_input

_CARRIES_WEIGHTS = (
    "group_offloading",
    "lazy_prefetch_group_offloading",
    "layer_execution_tracker",
    "lazy_leafs",
    "layerwise_casting",
    "peft_autocast_disable",
)
"""Hooks of diffusers that move or cast a layer's weights round its own forward and change nothing else."""

_CALLS_LAYERS = ("peft.tuners.lora.", "peft.tuners.ia3.")
"""Adapters round convolutions that call layers for whatever they compute."""

_XDITS_GROUPS = ("get_sp_group", "get_sequence_parallel_world_size")
"""What a function calls that shares tokens out among xDiT's ranks, as xDiT's example scripts have it."""

_CARRIES_DEVICES = ("AlignDevicesHook", "CpuOffload", "SequentialHook", "LayerwiseCastingHook")
"""The same of accelerate."""


class ModuleInspector:
    """Inspect one network before each generation, and compare it with what it was when it became known.

    Args:
        name: the pipeline's attribute that holds it, for messages.
        network: the network, as xDiT has wrapped it where it does.
        patched: whether its layers are given another `forward` by a subclass, which one of their own would hide.

    Attributes:
        hooks: forward hooks of unknown packages on its layers, by the layer, as `check` found them. They see one rank's
            rows, and what they make of these cannot be known.
    """

    def __init__(self, name: str, network: nn.Module, patched: bool) -> None:
        self.name, self.network, self._patched = name, network, patched
        self.hooks: dict[str, list[str]] = {}
        self._processors = {} if patched else dict(_processors(network))

    def check(self) -> None:
        """Inspect every module.

        Raises:
            ValueError: naming the layer, what was done to it, and what can be done about it.
        """
        package = package_of_class(getattr(self.network, "module_type", type(self.network)))
        kinds: dict[type, ModuleKind] = {}
        hooked = []
        for module in _all(self.network):
            kind, own = kinds.get(type(module)), vars(module)
            if kind is None:
                kind = kinds[type(module)] = ModuleKind.of(type(module), package)
            reason = None if kind.methods.isdisjoint(own) else self._own_method_reason(module, kind.methods)
            if reason is None and module is not self.network:
                reason = kind.reason
                if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                    hooked.append(module)
            if reason is None and self._patched and is_of_xdit(module):
                reason = "is a step cache of xDiT's, which is for transformers"
            weight = own["_parameters"].get("weight")
            if reason is None and type(weight) is not nn.Parameter and quantises_input(weight):
                reason = "quantises its input too, by which rounding becomes whole levels; quantise the weights alone"
            if reason is None and kind.is_dropout and module.training and cast(_DropoutNd, module).p > 0:
                reason = f"draws its dropout (p = {cast(_DropoutNd, module).p:g}) on each rank by itself; call eval()"
            if reason is not None:
                raise ValueError(f"--parallel does not support the pipeline's {self._label(module)}: it {reason}")
        self.hooks = self._foreign_hooks(hooked)
        self._check_processors()

    def _check_processors(self) -> None:
        """Refuse a processor that was put in the place of xDiT's, and so attends to this rank's tokens alone.

        Raises:
            ValueError: naming the layer and both processors.
        """
        for module, kind in self._processors.items():
            found = type(getattr(module, "processor", None))
            if found is not kind and package_of_class(found) != "xfuser":  # as those are that xDiT's scripts put in
                raise ValueError(
                    f"--parallel does not support the pipeline's {self._label(module)}: its attention processor was "
                    f"{kind.__name__} and now is {found.__name__}, which does not reach the other ranks; put the old "
                    "one back"
                )

    def _own_method_reason(self, module: nn.Module, methods: frozenset[str]) -> str | None:
        """Return why a method that was set on the module itself is refused; None where none is.

        A wrapped layer would not call it: a convolution's ``_conv_forward``, which people replace to make tiles, say.
        """
        for name in methods & vars(module).keys() - {"forward", "extra_repr"}:
            home = getattr(vars(module)[name], "__module__", None)
            if package_of(home) not in KNOWN_PACKAGES:
                return (
                    f"has a method {name} that has been replaced (by {home}), which patches would not call; undo that"
                )
        return self._forward_reason(module)

    def _forward_reason(self, module: nn.Module) -> str | None:
        """Return why a module's own `forward`, set on the instance, is refused; None where it is not."""
        forward = vars(module).get("forward")
        if forward is None:
            return None
        hooks = [*getattr(vars(module).get("_diffusers_hook"), "hooks", ())]
        carried = hook_names(module)
        if self._patched and module is self.network and not hooks and {*carried} <= {*WHOLE_NETWORK}:
            # The patched class is put under the hook, if what the hook calls is the network's own.
            if is_of_class(module, vars(module)["_old_forward"] if carried else forward):
                return None
        harmless = {*hooks} <= {*_CARRIES_WEIGHTS, *OF_DIFFUSERS} and {*carried} <= {*_CARRIES_DEVICES}
        if harmless and not self._patched and (hooks or carried or _is_own(module, forward)):
            return None
        by = ", ".join((*hooks, *carried)) or getattr(forward, "__module__", None) or type(forward).__name__
        return (
            f"has a forward that has been replaced (by {by}), as step caches, hooks and offload by layers do; undo "
            "that, and keep the network on the device (enable_model_cpu_offload() is fine)"
        )

    def _foreign_hooks(self, hooked: Iterable[nn.Module]) -> dict[str, list[str]]:
        """Return the forward hooks of unknown packages, in words, by the label of their layer."""
        found = {}
        for module in hooked:
            hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
            names = [described_function(hook) for hook in hooks if home_of(hook) not in KNOWN_PACKAGES]
            if names:
                found[self._label(module)] = names
        return found

    def _label(self, module: nn.Module) -> str:
        """Return a module's path and class, for messages."""
        path = next(path for path, found in self.network.named_modules() if found is module)
        return f"{self.name}.{path} ({type(module).__name__})" if path else f"{self.name} ({type(module).__name__})"


def check_no_gradients(network: nn.Module, *given: Any) -> None:
    """Refuse a call under which gradients would be computed: they would end at what other ranks sent.

    Args:
        network: to be called.
        given: the arguments of the call.

    Raises:
        ValueError: under gradient mode, where an input or a parameter requires gradients.
    """
    if not torch.is_grad_enabled():
        return
    inputs = any(isinstance(one, torch.Tensor) and one.requires_grad for one in given)
    if inputs or any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(
            f"--parallel does not support gradients of {type(network).__name__}: they would end at what other ranks "
            "send; call it under torch.no_grad()"
        )


def check_processors(name: str, network: nn.Module) -> None:
    """Refuse attention processors of unknown packages, before xDiT puts its own in their place unasked.

    Args:
        name: the pipeline's attribute that holds the network, for messages.
        network: to be inspected.

    Raises:
        ValueError: naming layer and processor.
    """
    for module, kind in _processors(network):
        if package_of_class(kind) not in KNOWN_PACKAGES:
            path = next(path for path, found in network.named_modules() if found is module)
            raise ValueError(
                f"--parallel does not support the attention processor {kind.__name__} of the pipeline's {name}.{path}: "
                "xDiT would put its own in its place; call set_default_attn_processor() if it may"
            )


def check_arguments_are_read(wrapper: Any, pipeline: Any, given: Mapping[str, Any]) -> None:
    """Refuse arguments of a pipeline that its wrapper takes and does not read, as some of xDiT's do.

    Args:
        wrapper, pipeline: `__call__` of the two classes.
        given: arguments of the call by name.

    Raises:
        ValueError: naming the argument.
    """
    reads, known = (signature(call).parameters for call in (wrapper, pipeline))
    for name in [name for name in given if name not in reads and name in known]:
        if given[name] is not known[name].default and given[name] != known[name].default:
            raise ValueError(f"xDiT's wrapper of this pipeline does not read {name}; leave it out, or run on one rank")


def defaults_of_pipeline(wrapper: Any, pipeline: Any) -> dict[str, Any]:
    """Return a pipeline's own defaults where its wrapper has others, as xDiT's of FLUX.2 klein has of another model.

    Args:
        wrapper, pipeline: `__call__` of the two classes.
    """
    own, theirs = (signature(call).parameters for call in (pipeline, wrapper))
    return {
        name: own[name].default
        for name in own
        if name in theirs and theirs[name].default != own[name].default and not name.startswith("callback")
    }


def check_adapter(name: str, module: nn.Module) -> None:
    """Refuse an adapter of PEFT that computes a convolution itself: on a patch it reads zeros beyond the edge.

    LoRA (DoRA too) and IA3 call layers, which patches wrap; others call ``F.conv2d`` with a weight of their own making.

    Args:
        name: the layer's, for messages.
        module: any layer of a network that is cut by rows.

    Raises:
        ValueError: naming layer and adapter, where the adapter is in use and not merged into the layer.
    """
    kind = type(module)
    if not kind.__module__.startswith("peft.") or kind.__module__.startswith(_CALLS_LAYERS):
        return
    conv, layer = module._modules.get("base_layer"), cast(Any, module)
    while conv is not None and "base_layer" in conv._modules:
        conv = conv._modules["base_layer"]
    sizes, strides = (getattr(conv, setting, ()) for setting in ("kernel_size", "stride"))
    if not any(size > stride for size, stride in zip(sizes, strides, strict=True)):
        return
    if not layer.disable_adapters and not layer.merged:
        raise ValueError(
            f"--parallel does not support the adapter on the convolution {name} ({kind.__module__}.{kind.__name__}): "
            "it computes the convolution itself, and would read zeros where a patch ends; merge it into the weights "
            "before the call (unet.fuse_lora()), leave convolutions out of its target_modules, or take LoRA"
        )


def _all(network: nn.Module) -> Iterator[nn.Module]:
    """Yield every module, shared ones more than once; `modules()` takes half as long again."""
    waiting = [network]
    while waiting:
        module = waiting.pop()
        yield module
        waiting.extend(child for child in module._modules.values() if child is not None)


def _processors(network: nn.Module) -> Iterator[tuple[nn.Module, type]]:
    """Yield attention modules and the classes of their processors."""
    for module in network.modules():
        processor = vars(module).get("processor") or module._modules.get("processor")
        if processor is not None:
            yield module, type(processor)


def _is_own(module: nn.Module, forward: Any) -> bool:
    """Tell whether an instance's `forward` is its class's, which hooks leave behind, or one that xDiT has set.

    An xDiT script that shares out a transformer's tokens by itself (`examples/*_usp_example.py`) counts as xDiT.
    """
    function = getattr(forward, "__func__", None)
    if function is type(module).forward or package_of(getattr(forward, "__module__", None)) == "xfuser":
        return True
    return bool(set(_names_in(getattr(function, "__code__", None))).intersection(_XDITS_GROUPS))


def _names_in(code: Any) -> Iterator[str]:
    """Yield the names that a function's code, and that of functions in it, refers to."""
    yield from getattr(code, "co_names", ())
    for constant in getattr(code, "co_consts", ()):
        if hasattr(constant, "co_names"):
            yield from _names_in(constant)
