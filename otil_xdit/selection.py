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
    """Picks k of K sub-blocks each step: some because they have waited longest (polling), the rest by score.

    With p polled sub-blocks none stays unsent for more than ceil(K / p) steps, whatever the scores are: the number of
    those that have waited longer than a given one shrinks by p a step until it is sent.

    Args:
        total: K.
        ratio: k / K.
        polling: share of the k that is polled.
        max_age: the bound that at least so many are polled for, ceil(K / p) <= max_age, as far as k allows; 0 for none.
        device: where scores are.
    """

    def __init__(self, total: int, ratio: float, polling: float, max_age: int, device: torch.device) -> None:
        self.total = total
        self.count = blocks_to_send(total, ratio)
        bounded = math.ceil(total / max_age) if max_age else 0
        self.polled = min(self.count, max(math.ceil(self.count * polling - 1e-9), bounded))
        # Ages times K, and a number below K for each, so that no two are equal and the order is the same everywhere.
        self._order = torch.arange(total - 1, -1, -1, device=device)
        self._age = torch.zeros_like(self._order)

    def reset(self) -> None:
        """Forget the ages, so that every generation picks alike."""
        self._age.zero_()

    def pick(self, scores: torch.Tensor) -> torch.Tensor:
        """Indices of the sub-blocks to send now.

        Args:
            scores: [K]; the sub-blocks with the largest scores are taken, after the polled ones.

        Returns:
            int64 [k] on the scores' device, without duplicates; fixed k, no host synchronisation.
        """
        assert scores.shape == (self.total,), f"scores {tuple(scores.shape)} for {self.total} sub-blocks"
        oldest = (self._age * self.total + self._order).topk(self.polled).indices
        best = scores.index_fill(0, oldest, -math.inf).topk(self.count - self.polled).indices
        picked = torch.cat([oldest, best])
        self._age.add_(1).index_fill_(0, picked, 0)
        return picked
