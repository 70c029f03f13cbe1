"""Which sub-blocks a rank sends: top-k of the change scores (scores.py), polling. Scores in, indices out.

Shapes: K sub-blocks, k sub-blocks sent a step; L layers that are picked for, l of them at a time.
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
        layers: L; each has ages of its own.
    """

    def __init__(
        self, total: int, ratio: float, polling: float, max_age: int, device: torch.device, layers: int = 1
    ) -> None:
        self.total = total
        self.count = blocks_to_send(total, ratio)
        bounded = math.ceil(total / max_age) if max_age else 0
        self.polled = min(self.count, max(math.ceil(self.count * polling - 1e-9), bounded))
        # Ages times K, and a number below K for each, so that no two are equal and the order is the same everywhere.
        self._order = torch.arange(total - 1, -1, -1, device=device)
        self._age = torch.zeros(layers, total, dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Forget the ages, so that every generation picks alike."""
        self._age.zero_()

    def pick(self, scores: torch.Tensor, layers: slice = slice(None)) -> torch.Tensor:
        """Indices of the sub-blocks to send now.

        Args:
            scores: [l, K]; the sub-blocks with the largest scores are taken, after the polled ones.
            layers: which ones they are of.

        Returns:
            int64 [l, k] on the scores' device, without duplicates; fixed k, no host synchronisation.
        """
        age = self._age[layers]
        assert scores.shape == age.shape, f"scores {tuple(scores.shape)} for {tuple(age.shape)} sub-blocks"
        if self.polled:
            oldest = (age * self.total + self._order).topk(self.polled).indices
            best = scores.scatter(1, oldest, -math.inf).topk(self.count - self.polled).indices
            picked = torch.cat([oldest, best], dim=1)
        else:
            picked = scores.topk(self.count).indices
        age.add_(1).scatter_(1, picked, 0)
        return picked
