"""`Stages`: a network cut in two segments of about equal cost, each computed by one CFG group of ranks.

Outside the window (`otil_xdit.method.window`) both groups compute the whole network, one with the prompt and one
without. In it only the pass with the prompt is computed: its first segment by the group that was without, the second by
the other group, from what the first segment gave a step before (AsyncDiff, NeurIPS 2024; Hybridiff, CVPR 2026); what it
gives now travels meanwhile. At the first step of the window the second group takes its own of the step before, and
nothing needs to be sent for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from otil_xdit.comm.collectives import CollectiveLabel
from otil_xdit.errors import NotInStages
from otil_xdit.hybridiff.boundary import Boundary
from otil_xdit.hybridiff.forward_hooks import ForwardHooks, Inputs
from otil_xdit.hybridiff.prompt import PromptExchange
from otil_xdit.hybridiff.role import StageRole
from otil_xdit.hybridiff.segments import CallUnit, SegmentRunner
from otil_xdit.hybridiff.tracing import Cut, Tracer


class Stages:
    """One network in two stages.

    Args:
        name: of the network, for messages.
        units: its blocks, in any order; each has its own `forward` again after `release`.
        role: this rank's part.
        needs_prompt: whether the group without the prompt is called without it, so that the other one must send its
            own: the first segment is of the pass with the prompt, like the second.
    """

    def __init__(self, name: str, units: Sequence[nn.Module], role: StageRole, needs_prompt: bool) -> None:
        self._name, self._role = name, role
        self._prompt = PromptExchange(name, role) if needs_prompt else None
        self._state: object = None
        self._runners: dict[tuple[Any, ...], SegmentRunner] = {}
        self._runner: SegmentRunner | None = None
        self._call_unit: CallUnit | None = None
        self._buffers: tuple[Boundary, ...] = ()
        self._known: Boundary | None = None
        self._known_at = -1
        self._hooks = ForwardHooks(units, self._call)

    def release(self) -> None:
        """Give the units their own classes back, and the buffers; nothing may be under way."""
        self._hooks.release()
        self._buffers, self._known, self._runner = (), None, None
        self._runners.clear()
        if self._prompt is not None:
            self._prompt.begin()

    def begin(self, state: object) -> None:
        """Forget an earlier generation, of which nothing is under way.

        Args:
            state: what else than the inputs' shapes says what units cost (LoRA); equal where nothing has changed.
        """
        if state != self._state:
            self._runners.clear()
        self._state = state
        self._known, self._known_at = None, -1
        if self._prompt is not None:
            self._prompt.begin()

    def wait(self) -> None:
        """Wait for what is under way."""
        for message in self._messages:
            message.wait()

    @property
    def nbytes(self) -> int:
        """Return the bytes of the buffers."""
        return sum(message.memory.nbytes for message in self._messages)

    @property
    def cut(self) -> Cut | None:
        """Return the cut of the last whole call."""
        return None if self._runner is None else self._runner.cut

    def can_run_staged(self, step: int) -> bool:
        """Return whether it is known what the first segment gave at the step before `step`."""
        return self._known_at == step - 1 >= 0

    def run_whole(self, call: Callable[[Any], Any], inputs: Any, step: int, keep: bool) -> Any:
        """Make the network's own call, all of it.

        Args:
            call: makes it.
            inputs: what it is made with; their shapes tell whether the cut is known.
            step: of the generation.
            keep: whether it may be the one before the window, so that the boundary is kept.

        Raises:
            NotInStages: naming the network and why it cannot be cut.
        """
        leaves = tree_leaves(inputs)
        if self._prompt is not None:
            self._prompt.record(leaves)
        key = tuple((leaf.shape, leaf.dtype) for leaf in leaves if isinstance(leaf, torch.Tensor))
        keeps, make = keep and self._role.is_second, partial(call, inputs)
        if key not in self._runners:
            output = self._trace(make, key, keeps)
        else:
            runner = self._use(self._runners[key])
            output = self._with_units(runner.whole(self._buffers[0]) if keeps else None, make)
        if keep:
            self._known, self._known_at = self._buffers[0], step
        return output

    def run_staged(self, call: Callable[[Any], Any], inputs: Any, step: int, goes_on: bool) -> Any:
        """Make this rank's segment of the call with the prompt.

        Args:
            call: makes it; what it gives means something on ranks of the second segment only.
            inputs: what it is made with.
            step: of the generation.
            goes_on: whether the step after it is in the window too.
        """
        known, runner, collectives, peer = self._known, self._runner, self._role.collectives, self._role.peer
        assert known is not None and runner is not None and self.can_run_staged(step), "the step before was computed"
        make = partial(call, inputs if self._prompt is None else self._prompt.with_prompt(inputs, step))
        label = CollectiveLabel("stages", f"the boundary of {self._name}", step)
        following = self._buffers[known is self._buffers[0]]
        following.wait()
        if self._role.is_second:
            known.wait()
            if goes_on:
                following.set_pending(collectives.receive(following.memory, peer, label))
            output = self._with_units(runner.second(known), make)
        else:
            output = self._with_units(runner.first(following), make)
            if goes_on:
                following.set_pending(collectives.send(following.memory, peer, label))
        self._known, self._known_at = following, step if goes_on else -1
        return output

    @property
    def _messages(self) -> tuple[Boundary, ...]:
        prompt = None if self._prompt is None else self._prompt.message
        return self._buffers if prompt is None else (*self._buffers, prompt)

    def _call(self, number: int, forward: Callable[[Inputs], Any], inputs: Inputs) -> Any:
        return forward(inputs) if self._call_unit is None else self._call_unit(number, partial(forward, inputs))

    def _with_units(self, call_unit: CallUnit | None, call: Callable[[], Any]) -> Any:
        """Make a call of the network in which `call_unit` calls the units; None for their own calls."""
        self._call_unit = call_unit
        try:
            return call()
        finally:
            self._call_unit = None

    def _trace(self, call: Callable[[], Any], key: tuple[Any, ...], keeps: bool) -> Any:
        """Make a whole call and find the cut for its shapes."""
        tracer, kept = Tracer(), dict[int, Any]()

        def call_unit(number: int, call: Callable[[], Any]) -> Any:
            output = tracer.unit(number, call)
            if keeps:  # which of it will be wanted is not known yet
                kept[number] = tree_map_only(torch.Tensor, torch.clone, output)
            return output

        with tracer:
            output = self._with_units(call_unit, call)
        counts = torch.tensor([*tracer.flops, tracer.glue], device=tracer.device)
        try:
            runner = SegmentRunner(Cut.of(tracer, self._role.sum_over_ranks(counts).tolist()))
        except NotInStages as error:
            raise NotInStages(f"--parallel hybridiff cannot cut the pipeline's {self._name} in two: {error}") from None
        self._runners[key] = self._use(runner)
        for number, unit_output in kept.items():
            runner.copy_output(self._buffers[0], number, unit_output)
        return output

    def _use(self, runner: SegmentRunner) -> SegmentRunner:
        """Make a cut the one that counts, with buffers for its boundary."""
        if runner is not self._runner:
            if self._runner is None or runner.cut.forms != self._runner.cut.forms:
                self.wait()
                self._buffers = Boundary(runner.cut.forms), Boundary(runner.cut.forms)
            self._runner = runner
        return runner
