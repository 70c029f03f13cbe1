"""Networks that torch.compile has compiled: their calls go through a function that is not compiled.

What brackets the call of a network on patches (its inputs are cut, its prediction is joined, a step begins) depends on
the step. It runs as it is, and inside it the graph of the network's own `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Called with the compiled call, its arguments and its named arguments; returns what the call is to return."""

_IN_PLACE = "_compiled_call_impl"
"""Attribute of a module on which ``module.compile()`` was called."""


@dataclass(eq=False)
class _RoutedCall:
    """The compiled call of a network, and what is round it."""

    compiled: Callable[..., Any]
    around: Around
    is_under_way: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_under_way:  # compiled in place, and wrapped besides
            return self.compiled(*args, **kwargs)
        self.is_under_way = True
        try:
            return self.around(self.compiled, args, kwargs)
        finally:
            self.is_under_way = False


class CompiledCalls:
    """The compiled calls of one network.

    Args:
        network: the module itself, not what ``torch.compile`` has returned for it.
        around: what is to be round its calls.
    """

    def __init__(self, network: nn.Module, around: Around) -> None:
        self._network, self._around = network, around
        self._routed: list[tuple[nn.Module, str, _RoutedCall]] = []

    def route(self, holders: Iterable[nn.Module]) -> None:
        """Find the compiled calls that are not routed yet.

        Args:
            holders: what pipelines hold; those of them that ``torch.compile`` has made of this network count.
        """
        self._put(self._network, _IN_PLACE)
        for holder in holders:
            if getattr(holder, "_orig_mod", None) is self._network:
                self._put(holder, "forward")

    def release(self) -> None:
        """Take it back."""
        for module, attribute, routed in self._routed:
            if vars(module).get(attribute) is routed:
                vars(module)[attribute] = routed.compiled
        self._routed.clear()

    def _put(self, module: nn.Module, attribute: str) -> None:
        compiled = vars(module).get(attribute)
        if compiled is not None and not isinstance(compiled, _RoutedCall):
            routed = _RoutedCall(compiled, self._around)
            vars(module)[attribute] = routed
            self._routed.append((module, attribute, routed))


def is_compiled(network: nn.Module) -> bool:
    """Tell whether a network, as a pipeline holds it, or a part of one was compiled as a whole."""
    return hasattr(network, "_orig_mod") or getattr(network, _IN_PLACE, None) is not None


def check_not_compiled(networks: Iterable[tuple[str, nn.Module]]) -> None:
    """Check that no network, and no part of one (`compile_repeated_blocks`), is compiled, by attribute of the pipeline.

    Raises:
        ValueError: naming one that is.
    """
    for name, network in networks:
        if is_compiled(network):
            raise ValueError(
                f"--parallel hybridiff does not support the compiled {name}: its blocks are called one by one; give "
                "the network that it was"
            )
        for path, module in network.named_modules():
            if is_compiled(module):
                raise ValueError(
                    f"--parallel hybridiff does not support compiled blocks, and {path} of the {name} is one: in the "
                    "window a block may be left out, or wait for the other ranks; leave compile_repeated_blocks() out"
                )
