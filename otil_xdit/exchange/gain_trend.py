"""How gains change from one step to the next, as far as the layers that have been called at this step tell.

The gains of all layers rise and fall together, because they follow how far the scheduler goes. So what the first layers
of a step find says how the gains of the others, which are a step old, have changed.
"""

from __future__ import annotations

import torch

from otil_xdit.method.inference import keeps_tensors
from otil_xdit.method.predictor import MOST_GAIN


class GainTrend:
    """The sums of the gains of the layers that were called at this step, and of those that the step before had found.

    With N this step's and P those of the step before, a layer's gain is multiplied by ``(1 + N) / (1 + P)``: one more
    layer, whose gain stays 1, keeps the first layers from deciding alone. Each rank has sums of its own, and payloads
    carry the gains that follow.
    """

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None
        self._step: int | None = None

    def begin(self) -> None:
        """Start a generation: no layer has been called."""
        self._step = None

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device."""
        return 0 if self._sums is None else self._sums.nbytes

    @property
    def sums(self) -> torch.Tensor:
        """The sums that `at` has returned last."""
        assert self._sums is not None, "a layer's keys and values are taken before they are sent"
        return self._sums

    @keeps_tensors
    def at(self, step: int, device: torch.device) -> torch.Tensor:
        """Return the sums at a step, float32 [2, 2]: of its gains, of keys and of values, and of those before it.

        Args:
            step: its number; of another one than that of the last call no layer has been called.
            device: of the layers.
        """
        if self._sums is None or self._sums.device != device:
            self._sums = torch.zeros(2, 2, device=device)
        elif step != self._step:
            self._sums.zero_()
        self._step = step
        return self._sums


def follow(trend: torch.Tensor, fitted: torch.Tensor) -> torch.Tensor:
    """Return what a layer's gains of the step before, float32 [2], are expected to be at this step, [2]."""
    now, before = trend + 1
    return (fitted * (now / before)).clamp_(0, MOST_GAIN)


def add(trend: torch.Tensor, fitted: torch.Tensor, before: torch.Tensor) -> None:
    """Add a layer's gains, and those of the step before, each float32 [2]."""
    trend[0] += fitted
    trend[1] += before
