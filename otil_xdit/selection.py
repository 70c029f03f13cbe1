"""Which sub-blocks a rank sends: change scores, top-k, polling. Tensors in, indices out.

Shapes: S tokens of one rank, K sub-blocks of T tokens, k sub-blocks sent a step, D features; ``...`` any leading
dimensions (keys and values, batch, heads).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

ChangeScore = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def cosine_change(fresh: torch.Tensor, previous: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """1 - cosine similarity of each sub-block with itself a step earlier (Otil's criterion).

    Args:
        fresh, previous: [..., S, D], any float type; summed in float32.
        table: int64 [K, T], the tokens of each sub-block (`grid.block_table`).

    Returns:
        float32 [K] in [0, 2]; larger means more change. A sub-block of zeros (padding) that stays so has not changed.
    """
    fresh, previous = fresh.float(), previous.float()
    dot = _block_sums(fresh * previous, table)
    fresh_norm, previous_norm = _block_sums(fresh.square(), table), _block_sums(previous.square(), table)
    change = 1 - dot / (fresh_norm * previous_norm).sqrt().clamp_min(1e-12)
    return change.masked_fill((fresh_norm == 0) & (previous_norm == 0), 0.0)


def l2_change(fresh: torch.Tensor, previous: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distance of each sub-block from itself a step earlier; arguments as in `cosine_change`."""
    return _block_sums((fresh.float() - previous.float()).square(), table)


def _block_sums(features: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Sum of [..., S, D] over everything but the sub-block: tokens first, so that no sub-block is copied out."""
    per_token = features.sum(dim=-1).reshape(-1, features.shape[-2]).sum(dim=0)
    return per_token[table].sum(dim=1)


CHANGE_SCORES: dict[str, ChangeScore] = {"cosine": cosine_change, "l2": l2_change}
"""Criteria by the name that follows ``latent-`` or ``kv-`` in `OtilConfig.select`; a new one is one function here."""


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
