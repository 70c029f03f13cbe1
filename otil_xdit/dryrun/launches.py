"""Counts what code would ask of a card: kernels that the host launches, and bytes that they read and write.

Counted by shapes alone, on "meta" or fake tensors, so that no card is needed. What an operator asks for is known by its
name: most are one kernel, views are none, and a tensor is moved once, where nothing else is said below.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from otil_xdit.dryrun.flops import call_controls, call_network
from otil_xdit.dryrun.job import Job
from otil_xdit.method.kernels import fused_on

_NO_LAUNCH = frozenset(
    "view _unsafe_view expand permute transpose t slice select unsqueeze squeeze as_strided detach alias split "
    "split_with_sizes unbind unfold diagonal _reshape_alias empty empty_like new_empty empty_strided "
    "new_empty_strided lift_fresh view_as_real view_as_complex resize_ set_ real imag device".split()
)
"""Operators that only make another view, or memory; by the name of the overload packet."""

_LAUNCHES = {
    "native_group_norm": 3,
    "topk": 2,
    "sort": 2,
    "correct_copies": 2,
    "encode_adaptive": 3,
}
"""Operators that are more than one kernel on CUDA, and how many; all others count as one."""

_COPIES_OF_ALL = ("value", "velocity")

_MOVED = {
    "correct_copies": lambda given: _twice(given, *_COPIES_OF_ALL),
    "take_own": lambda given: _twice(given, "copies", "velocities") * (given.get("received") is not None),
    "advance_adaptive": lambda given: _of_some(given) - _share_of_own(given, "out"),
    "read_adaptive": lambda given: -_codes(given),
    "encode_adaptive": lambda given: -_not_sent(given),
    "encode_residuals": lambda given: -_not_sent(given),
    "set_coded": lambda given: _twice(given, *_COPIES_OF_ALL) * given["known"] - _share_of_own(given, "out"),
    "set_gathered": lambda given: 0 if given["velocity"] is None else _twice(given, *_COPIES_OF_ALL) * given["known"],
    "write_others": lambda given: -_share_of_own(given, "copies", "velocities", "out"),
}
"""What our own operators move beyond each tensor once, by their arguments: copies are read and written, only what is
sent is coded, how codes are to be read says a small part of a payload, and a rank's own part of all ranks' copies may
be left out."""


@dataclass(frozen=True)
class Launches:
    """What was asked for: a number of kernels, and the bytes that they move."""

    count: int = 0
    nbytes: int = 0

    def __add__(self, other: Launches) -> Launches:
        return Launches(self.count + other.count, self.nbytes + other.nbytes)


def is_launched(func: Any) -> bool:
    """Tell whether an operator does more on a card than make a view, or memory."""
    return func.namespace != "prim" and func._overloadpacket.__name__ not in _NO_LAUNCH


def launches_of(func: Any, tensors: list[torch.Tensor], args: tuple[Any, ...]) -> Launches:
    """Return what one operator asks for.

    Args:
        func: the operator's overload.
        tensors: all that it is given and gives, each once; of an expanded one the distinct part counts.
        args: as it is called.
    """
    name = func._overloadpacket.__name__
    in_place = name.endswith("_") and name not in ("copy_", "zero_", "fill_")
    more = distinct_bytes(args[0]) if in_place and isinstance(args[0], torch.Tensor) else 0
    if name in _MOVED:
        names = [argument.name for argument in func._schema.arguments]
        more += _MOVED[name](dict(zip(names, args, strict=False)))
    return Launches(_LAUNCHES.get(name, 1), sum(map(distinct_bytes, tensors)) + more)


def tensors_of(*given: Any) -> list[torch.Tensor]:
    """Return the tensors among an operator's arguments and results, each once."""
    return list({id(one): one for one in _tensors(given)}.values())


def _tensors(given: Any) -> Iterator[torch.Tensor]:
    if isinstance(given, torch.Tensor):
        yield given
    elif isinstance(given, (list, tuple)):
        for one in given:
            yield from _tensors(one)


def distinct_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor; of a dimension that is expanded those of one entry."""
    found = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found *= size if stride else 1
    return found


def _twice(given: dict[str, Any], *names: str) -> int:
    """Return the bytes of some of an operator's arguments, where they are given."""
    return sum(distinct_bytes(given[name]) for name in names if given.get(name) is not None)


def _of_some(given: dict[str, Any]) -> int:
    """Return what correcting the copies of `whose` moves beyond all copies and payloads once."""
    ranks = given["value"].shape[-5]
    others = {0: 0, 1: ranks - 1, 2: 1}[given["whose"]]
    copies, payloads = _twice(given, *_COPIES_OF_ALL), _twice(given, "received")
    return copies - (2 * copies + payloads) * others // ranks


def _codes(given: dict[str, Any]) -> int:
    """Return the bytes of all payloads but for the sizes of features and the numbers of sub-blocks."""
    ranks, layers, size = given["received"].shape
    return int(ranks * layers * (size - 2 * given["width"] - 4 * given["count"]))


def _not_sent(given: dict[str, Any]) -> int:
    """Return the bytes of the residuals of tokens that are not sent."""
    if given["selected"] is None:
        return 0
    tokens = given["residuals"].shape[3]
    sent = min(given["selected"].shape[1] * given["table"].shape[1], tokens)
    return _twice(given, "residuals") * (tokens - sent) // tokens


def _share_of_own(given: dict[str, Any], *names: str) -> int:
    """Return one rank's share of the bytes of all ranks' keys and values."""
    copies = given["value"] if "value" in given else given["copies"]
    return _twice(given, *names) // copies.shape[-5]


class LaunchCounter(TorchDispatchMode):
    """Counts what is asked of "meta" tensors while it is entered.

    Attributes:
        found: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = Launches()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        out = func(*args, **given)
        if is_launched(func):
            tensors = tensors_of(args, tuple(given.values()), out)
            if any(one.is_meta for one in tensors) and any(one.numel() for one in tensors):
                self.found += launches_of(func, tensors, args)
        return out


@contextmanager
def as_on_cuda(counter: LaunchCounter) -> Iterator[None]:
    """Count what a network's call on "meta" would ask of a card, with the kernels that it has there."""
    with fused_on("meta"), _OneKernelAttention(), counter:
        yield


@lru_cache(maxsize=16)
def launches_of_network(job: Job) -> Launches:
    """Count one process's step, without what the pipeline and its scheduler launch besides.

    Raises:
        ValueError: for networks whose call is not known here.
    """
    job.cast_network(), job.cast_controls()  # once an image, so nothing that a step launches
    counter = LaunchCounter()
    with torch.no_grad(), _OneKernelAttention(), counter:
        call_network(job, call_controls(job))
    return counter.found


class _OneKernelAttention(TorchFunctionMode):
    """Attention is one operator, as on a card; on "meta" torch takes the many of its fallback."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return out
