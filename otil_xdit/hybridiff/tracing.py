"""Trace one call of a network: what its blocks cost, which reads whose output, and where it is best cut in two.

A network is taken for a row of *units* (residual and transformer blocks) that are called one after the other, with
little in between. Nothing is known about particular networks here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper

from otil_xdit.errors import NotInStages


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Return the FLOPs of attention between tensors of these shapes, [B, H, S, D], as torch counts them."""
    return int(sdpa_flop_count(query, key, value))


CPU_ATTENTION: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
"""Formulas that torch's FlopCounterMode lacks, as its `custom_mapping`."""

FLOPS: dict[Any, Any] = {**flop_registry, **{call: shape_wrapper(flops) for call, flops in CPU_ATTENTION.items()}}
"""The formula for an operation's FLOPs, by operation."""

Place = tuple[int, int]
"""One output tensor of a unit: the unit's place in the order of calls, and the tensor's among the unit's outputs."""


@dataclass(frozen=True)
class Form:
    """Shape, dtype and device of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Form:
        """Return the form of `tensor`."""
        return cls(tensor.shape, tensor.dtype, tensor.device)

    @property
    def nbytes(self) -> int:
        """Bytes of such a tensor."""
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Output:
    """The form of a unit's output.

    Attributes:
        spec: how its leaves are put together.
        leaves: a `Form` for each tensor, and anything else as it is.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, given: Any) -> Output:
        """Return the form of `given`, a unit's output: tensors in containers of any depth."""
        leaves, spec = tree_flatten(given)
        return cls(spec, tuple(Form.of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves))


class Tracer(TorchDispatchMode):
    """Record one call of a network whose units are called by `unit`.

    Attributes:
        order: units in the order of their calls.
        outputs: the form of each unit's output, in that order.
        flops: FLOPs of each unit, in that order.
        glue: FLOPs outside all units.
        reads: for each place in the order, and the end, the tensors of units that are read there: by the unit itself,
            or between it and the one before; also by way of what was made of them between units.
        device: where units compute.
    """

    def __init__(self) -> None:
        super().__init__()
        self.order: list[int] = []
        self.outputs: list[Output] = []
        self.flops: list[int] = []
        self.glue = 0
        self.reads: list[set[Place]] = [set()]
        self.device = torch.device("cpu")
        # By storage. One that is freed may be another's later, but then something has been written to it in between.
        self._made_of: dict[int, frozenset[Place]] = {}
        self._inside = False

    def unit(self, number: int, call: Callable[[], Any]) -> Any:
        """Call a unit.

        Args:
            number: tells the unit from the others.
            call: calls it.

        Returns:
            What it returns.

        Raises:
            NotInStages: when it was called before.
        """
        if number in self.order:
            raise NotInStages("one of its blocks is called more than once in one call")
        place = len(self.order)
        self.order.append(number)
        self.flops.append(0)
        self._inside = True
        try:
            given = call()
        finally:
            self._inside = False
        self.outputs.append(Output.of(given))
        self.reads.append(set())
        found: dict[int, set[Place]] = {}
        for leaf_place, leaf in enumerate(tree_leaves(given)):
            if isinstance(leaf, torch.Tensor):
                self.device = leaf.device
                found.setdefault(_storage(leaf), set()).add((place, leaf_place))
        self._made_of.update({storage: frozenset(places) for storage, places in found.items()})
        return given

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = func(*args, **kwargs)
        formula = FLOPS.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self._add(formula(*args, **kwargs, out_val=given))
        read = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        places = frozenset[Place]().union(*(self._made_of.get(storage, frozenset()) for storage in read))
        self.reads[-1].update(places)
        for leaf in tree_leaves(given):
            # What a unit writes is told by what it gives; between units, a result is made of all that it is made from.
            if isinstance(leaf, torch.Tensor) and not (self._inside and _storage(leaf) in read):
                self._made_of[_storage(leaf)] = frozenset() if self._inside else places
        return given

    def _add(self, flops: int) -> None:
        """Count FLOPs for the unit under way, or outside all units."""
        if self._inside:
            self.flops[-1] += flops
        else:
            self.glue += flops


@dataclass(frozen=True)
class Cut:
    """Where a network is cut in two segments.

    Attributes:
        place: the first unit of the second segment, in the order of calls.
        order: units in that order.
        outputs: the form of each unit's output.
        boundary: the tensors of the first segment that the second reads.
        flops: FLOPs of the two segments, without those outside all units.
        glue: FLOPs outside all units, which every rank computes.
    """

    place: int
    order: tuple[int, ...]
    outputs: tuple[Output, ...]
    boundary: tuple[Place, ...]
    flops: tuple[int, int]
    glue: int

    @classmethod
    def of(cls, trace: Tracer, flops: Sequence[int]) -> Cut:
        """Return the cut at which the longer of the two segments is shortest.

        Args:
            trace: of a whole call.
            flops: FLOPs of each unit in turn, then those outside all units. They are summed over all ranks, so that
                all ranks cut alike.

        Raises:
            NotInStages: for a network of fewer than two units.
        """
        *units, glue = flops
        if len(units) < 2:
            raise NotInStages(f"it has {len(units)} blocks to cut between")
        before = list(accumulate(units))
        longest = [max(cost, before[-1] - cost) for cost in before[:-1]]
        place = 1 + longest.index(min(longest))
        read = set[Place]().union(*trace.reads[place:])
        boundary = tuple(sorted(found for found in read if found[0] < place))
        segments = before[place - 1], before[-1] - before[place - 1]
        return cls(place, tuple(trace.order), tuple(trace.outputs), boundary, segments, glue)

    @property
    def forms(self) -> tuple[Form, ...]:
        """Forms of the boundary's tensors."""
        return tuple(self.outputs[unit].leaves[leaf] for unit, leaf in self.boundary)


def _storage(tensor: torch.Tensor) -> int:
    """Return a number that tensors share which share memory."""
    return tensor.untyped_storage()._cdata
