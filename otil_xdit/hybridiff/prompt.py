"""`PromptExchange`: in two stages both segments are of the pass with the prompt, so both CFG groups need the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from otil_xdit.comm.collectives import CollectiveLabel
from otil_xdit.errors import NotInStages
from otil_xdit.hybridiff.boundary import Boundary
from otil_xdit.hybridiff.role import StageRole
from otil_xdit.hybridiff.tracing import Form


class PromptExchange:
    """Sends the prompt from the CFG group with it to the one without, once a generation.

    Args:
        name: of the network, for messages.
        role: this rank's.
    """

    def __init__(self, name: str, role: StageRole) -> None:
        self._name, self._role = name, role
        self._leaves_before: list[Any] = []
        self._places: list[int] = []
        self.message: Boundary | None = None

    def begin(self) -> None:
        """Forget an earlier generation's prompt."""
        self._leaves_before, self._places, self.message = [], [], None

    def record(self, leaves: list[Any]) -> None:
        """Remember what a whole call of the network was made with."""
        self._leaves_before = leaves

    def with_prompt(self, inputs: Any, step: int) -> Any:
        """Return the inputs of a call; in the group without the prompt, with that of the other group.

        The prompt, in whatever form, is what a step is called with like the step before; the latent and the time are
        new objects at every step.

        Raises:
            NotInStages: when there is no such tensor.
        """
        leaves, spec = tree_flatten(inputs)
        message = self.message
        if message is None:
            pairs = enumerate(zip(leaves, self._leaves_before, strict=True))
            self._places = [place for place, (now, before) in pairs if now is before and isinstance(now, torch.Tensor)]
            if not self._places:
                raise NotInStages(f"--parallel hybridiff cannot tell the prompt among what {self._name} is called with")
            message = self.message = self._start([leaves[place] for place in self._places], step)
        message.wait()
        if self._role.is_second:
            return inputs
        for place, tensor in zip(self._places, message.tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, spec)

    def _start(self, own: list[torch.Tensor], step: int) -> Boundary:
        """Start sending this rank's tensors, or receiving the other group's, which have the same forms."""
        collectives, peer = self._role.collectives, self._role.peer
        label = CollectiveLabel("prompt", f"the prompt of {self._name}", step)
        message = Boundary([Form.of(tensor) for tensor in own])
        if self._role.is_second:
            for tensor, target in zip(own, message.tensors, strict=True):
                target.copy_(tensor)
            message.set_pending(collectives.send(message.memory, peer, label))
        else:
            message.set_pending(collectives.receive(message.memory, peer, label))
        return message
