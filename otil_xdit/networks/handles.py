"""Operators of layers in a graph of torch.compile, and handles, by which such an operator knows whose it is.

A layer that needs the other ranks calls one operator, which the compiler does not look into. What is sent at a step,
and what is waited for, is decided in the operator when the graph runs, so one graph serves all steps.

A graph takes tensors and constants. A name would be a constant, so every layer would need a graph of its own; a number
in a tensor is an input, so one graph serves all layers that compute alike (`compile_repeated_blocks`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch

NAMESPACE = "otil_xdit"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_numbers = count()
_owners: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""The owners of the process's handles; weak, so that none of them outlives its pipeline's session."""


@dataclass(frozen=True, eq=False)
class Handle:
    """Stands for a layer in a compiled graph.

    Attributes:
        index: tells it from every other one of the process.
        number: the same as an int64 scalar on the CPU, to be read without waiting for a device.
        order: uint8 [1] on the CPU, shared by the layers of a network. Each operator declares that it writes to it, so
            that a compiler neither changes their order, which must be the same on all ranks, nor drops one.
    """

    index: int
    number: torch.Tensor
    order: torch.Tensor

    @classmethod
    def make(cls, owner: object, order: torch.Tensor) -> Handle:
        """Return a handle of `owner`, which `owner_of` finds as long as something else keeps it alive."""
        index = next(_numbers)
        _owners[index] = owner
        return cls(index, torch.tensor(index), order)

    def give_to(self, owner: object) -> None:
        """Make `owner` what the handle stands for: what is known of the same layer in another generation."""
        _owners[self.index] = owner


def make_order() -> torch.Tensor:
    """Return what the handles of one network have in common."""
    return torch.zeros(1, dtype=torch.uint8)


def owner_of(number: torch.Tensor) -> Any:
    """Return what a handle stands for.

    Raises:
        RuntimeError: where it is gone, as a graph has been kept that was made for a session which has ended.
    """
    owner = _owners.get(int(number))
    if owner is None:
        raise RuntimeError(
            "this network was compiled for a parallel session that has ended; give the pipeline the network that it "
            "was, and compile it again"
        )
    return owner


def define_operator(
    name: str, arguments: str, returns: str, compute: Callable[..., Any], like: Callable[..., Any]
) -> Any:
    """Define ``torch.ops.otil_xdit.NAME(number, order, *arguments)``, whose results are memory of their own.

    Args:
        name: of the operator.
        arguments: those after a handle's two tensors, and `returns`, in the language of torch's schemas.
        returns: see above.
        compute: called with all arguments when a graph runs.
        like: called with all arguments when a graph is made; returns tensors of the results' shapes and strides.

    Returns:
        The operator.
    """
    _library.define(f"{name}(Tensor number, Tensor(a!) order, {arguments}) -> {returns}")
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", like, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
