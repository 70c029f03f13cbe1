"""The gains that payloads are coded with, before those of the step are known.

A layer's gain is known once its keys and values have been compared with what the others predict, but a payload is coded
in that same pass. So it is coded with an expected gain. Gains of one layer scatter from step to step: what is expected
is a mean that fades. And the gains of all layers rise and fall together, as they follow how far the scheduler goes: so
what the first layers of a step find moves what is expected of the others.

By which share, and how fast what a layer found fades, was fitted to the gains of three networks and two numbers of
steps (docs/LOG.md, 2026-11-28).
"""

from __future__ import annotations

import torch

from otil_xdit.method.inference import keeps_tensors
from otil_xdit.method.predictor import MOST_GAIN

SHARE = 0.6
"""Of a gain that was found in what is expected of the next one; the rest is what the payload was coded with."""

FADING = 0.8
"""Weight that what a layer found has left when the next layer is called."""


class GainTrend:
    """What the layers that were called at this step have found beyond what was expected of them.

    With S the faded sum of that, W the sum of its weights, and e what is expected of a layer, its payload is coded with
    ``e + S / (1 + W)``: beside the layers called before stands one that found what was expected. Each rank has sums of
    its own, and payloads carry the gains that follow.
    """

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None
        self._step: int | None = None

    @keeps_tensors
    def allocate(self, device: torch.device) -> None:
        """Make the sums, on the layers' device, unless there are some."""
        if self._sums is None or self._sums.device != device:
            self._sums, self._step = torch.zeros(3, device=device), None

    def begin(self) -> None:
        """Start a generation: no layer has been called."""
        self._step = None

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device."""
        return 0 if self._sums is None else self._sums.nbytes

    @property
    def sums(self) -> torch.Tensor:
        """S of keys and of values, and W, float32 [3], of the step that `at` has been called for last."""
        assert self._sums is not None, "see `allocate`"
        return self._sums

    def at(self, step: int) -> torch.Tensor:
        """Return the sums at a step; of another one than that of the last call no layer has been called."""
        if step != self._step:
            self.sums.zero_()
        self._step = step
        return self.sums


def follow(trend: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the gains, float32 [2], that a payload is coded with, from what is expected of its layer, [2]."""
    return (expected + trend[:2] / (1 + trend[2])).clamp_(0, MOST_GAIN)


def add(trend: torch.Tensor, fitted: torch.Tensor, expected: torch.Tensor) -> None:
    """Add what a layer has found, float32 [2], beyond what was expected of it, [2]."""
    trend.mul_(FADING)
    trend[:2] += fitted - expected
    trend[2] += 1
