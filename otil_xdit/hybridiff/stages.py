"""Two stages: a network cut in two segments of about equal cost, each computed by one half of the ranks.

Outside the window (`otil_xdit.method.window`) both halves compute the whole network, one with the prompt and one
without. In
it only the pass with the prompt is computed: its first segment by the half that was without, the second by the other
half, from what the first segment gave a step before (AsyncDiff, NeurIPS 2024; Hybridiff, CVPR 2026); what it gives now
travels meanwhile. At the first step of the window the second half takes its own of the step before, and nothing needs
to be sent for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial, wraps
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from otil_xdit.comm.collectives import Collectives, Pending
from otil_xdit.errors import NotInStages
from otil_xdit.hybridiff.tracing import Cut, Form, Tracer
from otil_xdit.networks.class_swap import restore_class, subclass_of, swap_class

_SEAT = "_otil_unit"

_ALIGNMENT = 16
"""Bytes; where a tensor may begin in a message, whatever its type."""


CallUnit = Callable[[int, Callable[[], Any]], Any]
"""How a unit is called: its number, and what makes its own call."""


class Boundary:
    """Tensors in one piece of memory, which is one message: those between the segments, or the prompt's."""

    def __init__(self, forms: Sequence[Form]) -> None:
        ends = [0, *accumulate(-(-form.nbytes // _ALIGNMENT) * _ALIGNMENT for form in forms)]
        self.memory = torch.zeros(ends[-1], dtype=torch.uint8, device=forms[0].device)
        self.tensors = [
            self.memory[start : start + form.nbytes].view(form.dtype).view(form.shape)
            for start, form in zip(ends, forms, strict=False)
        ]
        self._pending: Pending[torch.Tensor] | None = None

    def travels(self, pending: Pending[torch.Tensor]) -> None:
        """Its message is under way."""
        self._pending = pending

    def settle(self) -> None:
        """Wait for what is under way."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()


@dataclass(frozen=True)
class Side:
    """One rank's part in two stages.

    Attributes:
        is_second: whether it computes the second segment, and is the one with the prompt.
        peer: the rank with the same rows in the other half, by its place among the ranks of the image.
        exchange: of those ranks.
        add_up: gives the sum over all of them of an int64 tensor, on every rank.
    """

    is_second: bool
    peer: int
    collectives: Collectives
    add_up: Callable[[torch.Tensor], torch.Tensor]


class Stages:
    """One network in two stages.

    Args:
        name: of the network, for messages.
        units: its blocks, in any order; each has its own `forward` again after `release`.
        side: this rank's part.
        needs_prompt: whether the first half is called without the prompt, so that the second one must show it its own:
            the first segment is of the pass with the prompt, like the second.
    """

    def __init__(self, name: str, units: Sequence[nn.Module], side: Side, needs_prompt: bool) -> None:
        self._name, self._units, self._side = name, list(units), side
        self._needs_prompt = needs_prompt
        self._inputs: list[Any] = []
        self._prompt: tuple[list[int], Boundary] | None = None
        self._state: object = None
        self._cuts: dict[tuple[Any, ...], Cut] = {}
        self._cut: Cut | None = None
        self._places: dict[int, int] = {}
        self._call_unit: CallUnit | None = None
        self._buffers: tuple[Boundary, ...] = ()
        self._known: Boundary | None = None
        self._known_at = -1
        self._blanks: dict[Form, torch.Tensor] = {}
        for number, unit in enumerate(self._units):
            swap_class(unit, _staged_unit)
            vars(unit)[_SEAT] = (self, number)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stages:
        return self  # process groups cannot be copied, and a copied network is nobody's stage

    def release(self) -> None:
        """Give the units their own classes back, and the buffers; nothing may be under way."""
        for unit in self._units:
            restore_class(unit)
            del vars(unit)[_SEAT]
        self._units.clear()
        self._buffers, self._known, self._cut, self._prompt = (), None, None, None
        self._cuts.clear()
        self._blanks.clear()

    def begin(self, state: object) -> None:
        """Forget an earlier generation, of which nothing is under way.

        Args:
            state: what else than the inputs' shapes says what units cost (LoRA); equal where nothing has changed.
        """
        if state != self._state:
            self._cuts.clear()
        self._state = state
        self._known, self._known_at = None, -1
        self._inputs, self._prompt = [], None

    def drain(self) -> None:
        """Wait for what is under way."""
        for message in self._messages:
            message.settle()

    @property
    def nbytes(self) -> int:
        """Of the buffers."""
        return sum(message.memory.nbytes for message in self._messages)

    @property
    def cut(self) -> Cut | None:
        """Of the last whole call."""
        return self._cut

    def can_be_staged(self, step: int) -> bool:
        """Whether it is known what the first segment gave at the step before `step`."""
        return self._known_at == step - 1 >= 0

    def whole(self, call: Callable[[Any], Any], inputs: Any, step: int, keep: bool) -> Any:
        """The network's own call, all of it.

        Args:
            call: makes it.
            inputs: what it is made with; their shapes tell whether the cut is known.
            step: of the generation.
            keep: whether it may be the one before the window, so that what the segments share is kept.

        Raises:
            NotInStages: naming the network and why it cannot be cut.
        """
        self._inputs = tree_leaves(inputs)
        key = tuple((leaf.shape, leaf.dtype) for leaf in self._inputs if isinstance(leaf, torch.Tensor))
        keeps, make = keep and self._side.is_second, partial(call, inputs)
        if key not in self._cuts:
            output = self._traced(make, key, keeps)
        else:
            self._use(self._cuts[key])
            output = self._called(partial(self._copying, self._buffers[0]) if keeps else None, make)
        if keep:
            self._known, self._known_at = self._buffers[0], step
        return output

    def staged(self, call: Callable[[Any], Any], inputs: Any, step: int, goes_on: bool) -> Any:
        """The network's call with this rank's segment alone computed.

        Args:
            call: makes it; what it gives means something on ranks of the second segment only.
            inputs: what it is made with.
            step: of the generation.
            goes_on: whether the step after it is in the window too.
        """
        known, collectives, peer = self._known, self._side.collectives, self._side.peer
        assert known is not None and self.can_be_staged(step), "the step before has been computed"
        make = partial(call, self._with_prompt(inputs, step) if self._needs_prompt else inputs)
        where = f"the boundary of {self._name} at step {step}"
        following = self._buffers[known is self._buffers[0]]
        following.settle()
        if self._side.is_second:
            known.settle()
            if goes_on:
                following.travels(collectives.receive(following.memory, peer, "stages", where))
            output = self._called(partial(self._second, known), make)
        else:
            output = self._called(partial(self._first, following), make)
            if goes_on:
                following.travels(collectives.send(following.memory, peer, "stages", where))
        self._known, self._known_at = following, step if goes_on else -1
        return output

    def unit(self, number: int, call: Callable[[], Any]) -> Any:
        """What the block of this number gives in the call of the network that is under way.

        Args:
            call: makes the block's own.
        """
        return call() if self._call_unit is None else self._call_unit(number, call)

    @property
    def _messages(self) -> tuple[Boundary, ...]:
        return self._buffers if self._prompt is None else (*self._buffers, self._prompt[1])

    def _with_prompt(self, inputs: Any, step: int) -> Any:
        """The inputs, on ranks of the first half with those of the second one where a step's are the last step's own.

        That is the prompt, in whatever form; the latent and the time are new objects at every step.
        """
        leaves, spec = tree_flatten(inputs)
        if self._prompt is None:
            pairs = enumerate(zip(leaves, self._inputs, strict=True))
            same = [place for place, (now, before) in pairs if now is before and isinstance(now, torch.Tensor)]
            if not same:
                raise NotInStages(f"--parallel hybridiff cannot tell the prompt among what {self._name} is called with")
            self._prompt = same, self._shown([leaves[place] for place in same], step)
        places, prompt = self._prompt
        prompt.settle()
        if self._side.is_second:
            return inputs
        for place, tensor in zip(places, prompt.tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, spec)

    def _shown(self, own: list[torch.Tensor], step: int) -> Boundary:
        """What the second half's tensors are, sent or on their way; `own` has the same forms."""
        collectives, peer = self._side.collectives, self._side.peer
        where = f"the prompt of {self._name} at step {step}"
        message = Boundary([Form.of(tensor) for tensor in own])
        if self._side.is_second:
            for tensor, there in zip(own, message.tensors, strict=True):
                there.copy_(tensor)
            message.travels(collectives.send(message.memory, peer, "prompt", where))
        else:
            message.travels(collectives.receive(message.memory, peer, "prompt", where))
        return message

    def _called(self, call_unit: CallUnit | None, call: Callable[[], Any]) -> Any:
        self._call_unit = call_unit
        try:
            return call()
        finally:
            self._call_unit = None

    def _traced(self, call: Callable[[], Any], key: tuple[Any, ...], keeps: bool) -> Any:
        """A whole call that finds the cut."""
        tracer, given = Tracer(), dict[int, Any]()

        def call_unit(number: int, call: Callable[[], Any]) -> Any:
            output = tracer.unit(number, call)
            if keeps:  # which of it will be wanted is not known yet
                given[number] = tree_map_only(torch.Tensor, torch.clone, output)
            return output

        with tracer:
            output = self._called(call_unit, call)
        counts = torch.tensor([*tracer.flops, tracer.glue], device=tracer.device)
        try:
            self._cuts[key] = Cut.of(tracer, self._side.add_up(counts).tolist())
        except NotInStages as error:
            raise NotInStages(f"--parallel hybridiff cannot cut the pipeline's {self._name} in two: {error}") from None
        self._use(self._cuts[key])
        for number, unit_output in given.items():
            self._copy(self._buffers[0], self._places[number], unit_output)
        return output

    def _use(self, cut: Cut) -> None:
        if cut is self._cut:
            return
        if self._cut is None or cut.forms != self._cut.forms:
            self.drain()
            self._buffers = Boundary(cut.forms), Boundary(cut.forms)
        self._cut = cut
        self._places = {number: place for place, number in enumerate(cut.order)}

    def _copy(self, buffer: Boundary, place: int, output: Any) -> None:
        """Put what of a unit's output the second segment reads into a buffer, before anybody changes it in place."""
        assert self._cut is not None, "a whole call has found the cut"
        leaves = tree_leaves(output)
        for (unit, leaf), tensor in zip(self._cut.boundary, buffer.tensors, strict=True):
            if unit == place:
                tensor.copy_(leaves[leaf])

    def _copying(self, buffer: Boundary, number: int, call: Callable[[], Any]) -> Any:
        output = call()
        self._copy(buffer, self._places[number], output)
        return output

    def _first(self, buffer: Boundary, number: int, call: Callable[[], Any]) -> Any:
        assert self._cut is not None, "a whole call has found the cut"
        if self._places[number] < self._cut.place:
            return self._copying(buffer, number, call)
        return self._blank(self._places[number], {})

    def _second(self, buffer: Boundary, number: int, call: Callable[[], Any]) -> Any:
        assert self._cut is not None, "a whole call has found the cut"
        place = self._places[number]
        if place >= self._cut.place:
            return call()
        known = {
            leaf: tensor
            for (unit, leaf), tensor in zip(self._cut.boundary, buffer.tensors, strict=True)
            if unit == place
        }
        return self._blank(place, known)

    def _blank(self, place: int, known: Mapping[int, torch.Tensor]) -> Any:
        """The output of a unit that is not computed: what of it is known, and zeros that nobody reads who matters."""
        assert self._cut is not None, "a whole call has found the cut"
        form = self._cut.outputs[place]
        leaves = [known.get(number, self._zeros(leaf)) for number, leaf in enumerate(form.leaves)]
        return tree_unflatten(leaves, form.spec)

    def _zeros(self, leaf: Any) -> Any:
        if not isinstance(leaf, Form):
            return leaf
        if leaf not in self._blanks:
            self._blanks[leaf] = torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        return self._blanks[leaf]


@cache
def _staged_unit(kind: Any) -> type:
    @wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seat = vars(self).get(_SEAT)
        if seat is None:
            return kind.forward(self, *args, **kwargs)
        stages, number = seat
        return stages.unit(number, partial(kind.forward, self, *args, **kwargs))

    return subclass_of(kind, {"forward": forward})
