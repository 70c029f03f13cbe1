"""Giving an object a subclass of its own class, and taking it back: how behaviour is added without wrapping.

The object keeps its identity, attributes, parameters, hooks and `isinstance`; a wrapper would change the names of a
module's parameters (LoRA files, state dicts) and hide it from code that asks for its type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def swap_class(thing: Any, derive: Callable[[type], type]) -> None:
    """Give `thing` the subclass that `derive` makes of its class (with `subclass_of`)."""
    _set_class(thing, derive(type(thing)))


def restore_class(thing: Any) -> None:
    """Give `thing` the class back that it had before `swap_class`."""
    _set_class(thing, type(thing)._otil_base)


def is_swapped(thing: Any) -> bool:
    """Whether `thing` has a class made by `subclass_of`."""
    return "_otil_base" in vars(type(thing))


def base_name(thing: Any) -> str:
    """The name of the class that `thing` has, or had before `swap_class`."""
    name: str = getattr(type(thing), "_otil_base", type(thing)).__name__
    return name


def subclass_of(kind: type, members: dict[str, Any]) -> type:
    """A subclass that code which asks for names (diffusers' save_pretrained, xDiT's checks) takes for `kind`."""
    members = {**members, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "_otil_base": kind}
    return type(kind)(kind.__name__, (kind,), members)


def _set_class(thing: Any, kind: type) -> None:
    # Not by assignment: xDiT's scheduler wrappers pass assignments, of __class__ too, on to what they wrap.
    object.__setattr__(thing, "__class__", kind)
