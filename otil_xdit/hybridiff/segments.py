"""`SegmentRunner`: how the units of a cut network are called where a rank computes one of the two segments only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_unflatten

from otil_xdit.hybridiff.boundary import Boundary
from otil_xdit.hybridiff.tracing import Cut, Form

CallUnit = Callable[[int, Callable[[], Any]], Any]
"""Calls a unit: gets its number and what makes its own call, and returns what stands for its output."""


class SegmentRunner:
    """The two segments of one cut.

    A unit that is not computed returns what is known of its output, and zeros for the rest: nothing that matters reads
    them.

    Args:
        cut: where the network is cut.
    """

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self._places = {number: place for place, number in enumerate(cut.order)}
        self._zeros: dict[Form, torch.Tensor] = {}

    def whole(self, boundary: Boundary) -> CallUnit:
        """Return how units are called where all are computed, and the boundary is kept."""
        return partial(self._call_and_copy, boundary)

    def first(self, boundary: Boundary) -> CallUnit:
        """Return how units are called where the first segment is computed, and gives the boundary."""

        def call_unit(number: int, call: Callable[[], Any]) -> Any:
            if self._places[number] < self.cut.place:
                return self._call_and_copy(boundary, number, call)
            return self._output(self._places[number], {})

        return call_unit

    def second(self, boundary: Boundary) -> CallUnit:
        """Return how units are called where the second segment is computed from the boundary."""

        def call_unit(number: int, call: Callable[[], Any]) -> Any:
            place = self._places[number]
            if place >= self.cut.place:
                return call()
            between = zip(self.cut.boundary, boundary.tensors, strict=True)
            return self._output(place, {leaf: tensor for (unit, leaf), tensor in between if unit == place})

        return call_unit

    def copy_output(self, boundary: Boundary, number: int, output: Any) -> None:
        """Copy what the second segment reads of a unit's output to the boundary.

        Args:
            number: the unit's.
        """
        leaves, place = tree_leaves(output), self._places[number]
        for (unit, leaf), tensor in zip(self.cut.boundary, boundary.tensors, strict=True):
            if unit == place:
                tensor.copy_(leaves[leaf])

    def _call_and_copy(self, boundary: Boundary, number: int, call: Callable[[], Any]) -> Any:
        output = call()
        self.copy_output(boundary, number, output)  # before anybody changes it in place
        return output

    def _output(self, place: int, known: Mapping[int, torch.Tensor]) -> Any:
        """Return the output of a unit that is not computed.

        Args:
            place: the unit's, in the order of calls.
            known: leaves of its output, by their place in it.
        """
        form = self.cut.outputs[place]
        leaves = [known.get(number, self._zeros_like(leaf)) for number, leaf in enumerate(form.leaves)]
        return tree_unflatten(leaves, form.spec)

    def _zeros_like(self, leaf: Any) -> Any:
        if not isinstance(leaf, Form):
            return leaf
        if leaf not in self._zeros:
            self._zeros[leaf] = torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        return self._zeros[leaf]
