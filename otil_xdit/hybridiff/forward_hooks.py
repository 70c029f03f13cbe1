"""`ForwardHooks`: modules whose calls go through one function, by a subclass of their class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

from torch import nn

from otil_xdit.networks.class_swap import restore_class, subclass_of, swap_class

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with: by position, and by name."""

CallModule = Callable[[int, Callable[[Inputs], Any], Inputs], Any]
"""Calls a module: gets its number, its own `forward` and the inputs, and returns what stands for its output."""

_HOOK = "_otil_forward_hook"


class ForwardHooks:
    """Modules whose calls go through `call_module` until `release`.

    Args:
        modules: a module's number is its place among them.
        call_module: see `CallModule`.
    """

    def __init__(self, modules: Sequence[nn.Module], call_module: CallModule) -> None:
        self.call_module = call_module
        self._modules = list(modules)
        for number, module in enumerate(self._modules):
            swap_class(module, _hooked)
            vars(module)[_HOOK] = (self, number)

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardHooks:
        return ForwardHooks((), _call_own)  # process groups cannot be copied, and a copied network is in no stages

    def release(self) -> None:
        """Give the modules their own classes back."""
        for module in self._modules:
            restore_class(module)
            del vars(module)[_HOOK]
        self._modules.clear()


def _call_own(number: int, forward: Callable[[Inputs], Any], inputs: Inputs) -> Any:
    return forward(inputs)


@cache
def _hooked(kind: Any) -> type:
    @wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        def call_forward(inputs: Inputs) -> Any:
            return kind.forward(self, *inputs[0], **inputs[1])

        hook: tuple[ForwardHooks, int] | None = vars(self).get(_HOOK)
        if hook is None:
            return call_forward((args, kwargs))
        hooks, number = hook
        return hooks.call_module(number, call_forward, (args, kwargs))

    return subclass_of(kind, {"forward": forward})
