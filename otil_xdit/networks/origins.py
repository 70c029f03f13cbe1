"""Where a layer's code comes from, and whether that is known to compute on a patch what it computes on the whole.

Shapes play no part here: packages are judged, classes of modules, their methods, and functions that are hooked on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from otil_xdit.networks.quantised import WEIGHT_ONLY

KNOWN_PACKAGES = ("torch", "diffusers", "transformers", "peft", "xfuser", "yunchang", "distvae", "otil_xdit")
"""Packages whose layers compute what their class says; the package of the network's own class is another."""

_UNKNOWN_PARTS = {
    "torch.ao": "it is quantised, and scales taken from a patch are not those of the whole image",
}
"""Parts of the known packages that change what a network computes, and how."""


@dataclass(frozen=True)
class ModuleKind:
    """What is known of all modules of a class.

    Attributes:
        reason: why such a layer is refused; None where it is not.
        methods: names of what a module could have in place of its class's.
        is_dropout: whether it draws random numbers in training.
    """

    reason: str | None
    methods: frozenset[str]
    is_dropout: bool

    @classmethod
    def of(cls, kind: type, package: str) -> ModuleKind:
        """Look at a class as it is now; `package` is that of the network's own."""
        base = vars(kind).get("_otil_base", kind)
        reason = _kind_reason(base, base.forward, package) or _method_reason(base, package)
        return cls(reason, _methods(kind), issubclass(kind, _DropoutNd))


@lru_cache(maxsize=1024)
def _methods(kind: type) -> frozenset[str]:
    """Return the names of a class's methods."""
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name, None)))


def _method_reason(kind: type, package: str) -> str | None:
    """Return which method of a known class somebody has replaced, for all of its layers; None where nobody has."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if package_of_class(base) not in KNOWN_PACKAGES:
            continue
        for name, method in vars(base).items():
            if isinstance(method, FunctionType) and package_of(method.__module__) not in (*KNOWN_PACKAGES, package):
                return (
                    f"has a method {name} that {method.__module__} has put into {base.__name__}, which is not known to "
                    "be the same on patches; undo that"
                )
    return None


@lru_cache(maxsize=4096)
def _kind_reason(kind: type, forward: Callable[..., Any], package: str) -> str | None:
    """Return why a layer of this class, with this `forward`, is not known; None where it is."""
    if f"{kind.__module__}.{kind.__name__}" in WEIGHT_ONLY:
        return None
    for home in (kind.__module__, getattr(forward, "__module__", None) or ""):
        for part, reason in _UNKNOWN_PARTS.items():
            if home == part or home.startswith(f"{part}."):
                return f"is a {part} layer: {reason}"
        if package_of(home) not in (*KNOWN_PACKAGES, package):
            return (
                f"computes what {home} makes of it, which is not known to be the same on patches (token merging, step "
                "caches and quantisation do such things)"
            )
    return None


def package_of_class(kind: type) -> str:
    """Return the package that a class comes from."""
    return package_of(kind.__module__)


def package_of(module: str | None) -> str:
    """Return the package of a module's path; empty for None."""
    return (module or "").partition(".")[0]


def home_of(function: Any) -> str:
    """Return the package that a function comes from."""
    while isinstance(function, partial):
        function = function.func
    return package_of(getattr(function, "__module__", None) or type(function).__module__)


def described_function(function: Any) -> str:
    """Return a function's module and name."""
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', type(function).__module__)}.{name}"
