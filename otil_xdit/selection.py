"""Which sub-blocks a rank sends: top-k of the change scores (scores.py), polling. Scores in, indices out.

Shapes: K sub-blocks, k sub-blocks sent a step.
"""

from __future__ import annotations

import math

import torch


def blocks_to_send(total: int, ratio: float) -> int:
    """k of `total` sub-blocks at `ratio`: never more than the ratio allows, but at least one."""
    return max(1, math.floor(total * ratio + 1e-9))


class Selector:
    """Picks k of K sub-blocks each step: some in turn (polling), the rest by score.

    Polling walks round the K sub-blocks, `polled` a step, so any ceil(K / polled) consecutive picks visit every
    sub-block at least once, whatever the scores are: the positions visited in them are at least K consecutive ones
    modulo K.
    """

    def __init__(self, total: int, ratio: float, polling: float) -> None:
        self.total = total
        self.count = blocks_to_send(total, ratio)
        self.polled = min(self.count, math.ceil(self.count * polling - 1e-9))
        self._cursor = 0

    def reset(self) -> None:
        """Start polling from the first sub-block again, so that every generation picks alike."""
        self._cursor = 0

    def pick(self, scores: torch.Tensor) -> torch.Tensor:
        """Indices of the sub-blocks to send now.

        Args:
            scores: [K]; the sub-blocks with the largest scores are taken, after the polled ones.

        Returns:
            int64 [k] on the scores' device, without duplicates; fixed k, no host synchronisation.
        """
        assert scores.shape == (self.total,), f"scores {tuple(scores.shape)} for {self.total} sub-blocks"
        turn = (torch.arange(self.polled, device=scores.device) + self._cursor) % self.total
        self._cursor = (self._cursor + self.polled) % self.total
        best = scores.index_fill(0, turn, -math.inf).topk(self.count - self.polled).indices
        return torch.cat([turn, best])
