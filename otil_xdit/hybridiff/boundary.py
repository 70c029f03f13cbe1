"""`Boundary`: tensors that travel as one message: those between two segments of a network, or a prompt's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from otil_xdit.comm.collectives import Pending
from otil_xdit.hybridiff.tracing import Form
from otil_xdit.method.inference import keeps_tensors

_ALIGNMENT = 16
"""Bytes; where a tensor may begin in a message, whatever its dtype."""


class Boundary:
    """Tensors in one piece of memory, which is one message.

    Args:
        forms: shape, dtype and device of each tensor; there is at least one, and all are on one device.

    Attributes:
        memory: uint8, [bytes].
        tensors: views of it, one for each of `forms`.
    """

    @keeps_tensors
    def __init__(self, forms: Sequence[Form]) -> None:
        ends = [0, *accumulate(-(-form.nbytes // _ALIGNMENT) * _ALIGNMENT for form in forms)]
        self.memory = torch.zeros(ends[-1], dtype=torch.uint8, device=forms[0].device)
        self.tensors = [
            self.memory[start : start + form.nbytes].view(form.dtype).view(form.shape)
            for start, form in zip(ends, forms, strict=False)
        ]
        self._pending: Pending[torch.Tensor] | None = None

    def set_pending(self, pending: Pending[torch.Tensor]) -> None:
        """Record that its message is under way."""
        self._pending = pending

    def wait(self) -> None:
        """Wait for the message that is under way, if there is one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()
