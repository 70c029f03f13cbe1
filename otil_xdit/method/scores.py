"""Change scores: how much each sub-block differs from itself a step earlier.

Shapes: S tokens of one rank, K sub-blocks of T tokens, D features; ``...`` any leading dimensions (keys and values,
batch, heads); V values of one sub-block. A channel is one feature of one index of the leading dimensions.

All scores take (fresh [..., S, D], previous [..., S, D], table int64 [K, T]), any float type, compute in float32 and
return float32 [K], larger for more change. Shapes are fixed, nothing waits for the host, and no sum depends on the
order in which a device adds: equal input gives equal scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

MI_BINS = 8
"""Bins a side of the joint histogram: a sub-block of 4 x 4 latent pixels has 64 values for its 64 cells."""

SSIM_CONSTANTS = (0.01, 0.03)
"""K1 and K2 of Wang et al., "Image quality assessment" (IEEE TIP 2004), relative to the range of the values."""


@dataclass(frozen=True)
class ChangeScore:
    """A change score; calling it computes it.

    Attributes:
        compute: takes and returns what `cosine_change` does.
        least_side: tokens a side that a sub-block must have for the score to mean something.
    """

    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    least_side: int = 1

    def __call__(self, fresh: torch.Tensor, previous: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Return the score of each sub-block; arguments as in `cosine_change`."""
        return self.compute(fresh, previous, table)


def cosine_change(fresh: torch.Tensor, previous: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return 1 - cosine similarity of each sub-block with itself a step earlier (Otil's criterion).

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
    """Return each sub-block's squared Euclidean distance from its last state; arguments as in `cosine_change`."""
    return _block_sums((fresh.float() - previous.float()).square(), table)


def l2_of_difference(difference: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return `l2_change` of several layers at once, from fresh - previous.

    Args:
        difference: float32 [L, ..., S, D].
        table: as in `cosine_change`.

    Returns:
        float32 [L, K].
    """
    per_token = torch.linalg.vector_norm(difference, dim=-1).square_().flatten(1, -2).sum(dim=1)
    return per_token[:, table].sum(dim=-1)


def ssim_change(fresh: torch.Tensor, previous: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return 1 - structural similarity (Wang et al., 2004) of each sub-block with itself a step earlier.

    It is the mean over channels.

    The window is the sub-block, without weights: means, population variances and covariance over its T tokens. The
    range in the two constants is the channel's own, over all S tokens of both steps, since keys, values and latents
    have no fixed one. Arguments as in `cosine_change`.

    Returns:
        float32 [K] in [0, 2]; 0 for a sub-block that has not changed.
    """
    new, old = _gathered(fresh, table), _gathered(previous, table)
    new_mean, old_mean = new.mean(dim=-2), old.mean(dim=-2)
    new, old = new - new_mean.unsqueeze(-2), old - old_mean.unsqueeze(-2)
    new_var, old_var = new.square().mean(dim=-2), old.square().mean(dim=-2)
    covariance = (new * old).mean(dim=-2)
    # Where a channel is one constant, both ratios below are 0 / 0; with a tiny range they are 1.
    span = _channel_range(fresh.float(), previous.float()).clamp_min(1e-12)
    small, large = ((constant * span).square() for constant in SSIM_CONSTANTS)
    luminance = (2 * new_mean * old_mean + small) / (new_mean.square() + old_mean.square() + small)
    structure = (2 * covariance + large) / (new_var + old_var + large)
    return 1 - (luminance * structure).movedim(-2, 0).flatten(1).mean(dim=1)


def mi_change(fresh: torch.Tensor, previous: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return minus the mutual information (nats) between each sub-block and itself a step earlier.

    From the joint histogram of a sub-block's values, all channels together: `MI_BINS` equal bins between the least and
    the largest value, of each step by itself. Arguments as in `cosine_change`.

    Returns:
        float32 [K] in [-log(MI_BINS), 0]. A sub-block whose values are all as before has the least, -log(MI_BINS):
        its mutual information alone, which is its entropy, would call a flat unchanged one (padding) changed.
    """
    new, old = (_gathered(features, table).movedim(-3, 0).flatten(1) for features in (fresh, previous))
    cell = _bins(new) * MI_BINS + _bins(old)
    # Integers: float sums of a scatter would depend on the order in which a GPU adds.
    counts = torch.zeros(table.shape[0], MI_BINS**2, dtype=torch.int32, device=cell.device)
    counts.scatter_add_(1, cell, torch.ones_like(cell, dtype=torch.int32))
    joint = (counts.float() / cell.shape[1]).unflatten(1, (MI_BINS, MI_BINS))
    entropies = [torch.special.entr(share).flatten(1).sum(dim=1) for share in (joint.sum(2), joint.sum(1), joint)]
    information = (entropies[0] + entropies[1] - entropies[2]).clamp(0.0, math.log(MI_BINS))
    return (-information).masked_fill((new == old).all(dim=1), -math.log(MI_BINS))


def dhash_change(fresh: torch.Tensor, previous: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the share of the difference hash's bits that differ between the steps; arguments as in `cosine_change`.

    A bit says whether a value is larger than its left neighbour in the sub-block, channel by channel.

    Returns:
        float32 [K] in [0, 1]; 0 too where a sub-block is one token wide and so has no bits.
    """
    differ = _difference_hash(fresh, table) != _difference_hash(previous, table)
    bits = differ.movedim(-4, 0).flatten(1)
    return bits.float().sum(dim=1) / max(1, bits.shape[1])


CHANGE_SCORES: dict[str, ChangeScore] = {
    "cosine": ChangeScore(cosine_change),
    "l2": ChangeScore(l2_change),
    "ssim": ChangeScore(ssim_change, least_side=8),  # Otil leaves it out for 4 x 4
    "mi": ChangeScore(mi_change),
    "dhash": ChangeScore(dhash_change, least_side=2),  # it compares horizontal neighbours
}
"""Change scores by the name that follows ``latent-`` or ``kv-`` in `OtilConfig.select`; a new one is one entry here."""


def check_score(criterion: str, tokens_a_side: int) -> None:
    """Refuse a change score that does not exist or means nothing for sub-blocks of that many tokens a side.

    Raises:
        ValueError: naming what would be accepted.
    """
    fitting = [name for name, score in CHANGE_SCORES.items() if tokens_a_side >= score.least_side]
    if criterion not in CHANGE_SCORES:
        raise ValueError(f"{criterion!r} is not a change score; choose from {', '.join(fitting)}")
    if criterion not in fitting:
        least = CHANGE_SCORES[criterion].least_side
        raise ValueError(
            f"the change score {criterion} needs sub-blocks of at least {least} x {least} tokens, not {tokens_a_side} "
            f"x {tokens_a_side}; give larger sub-blocks, or choose from {', '.join(fitting)}"
        )


def _block_sums(features: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Sum of [..., S, D] over everything but the sub-block: tokens first, so that no sub-block is copied out."""
    per_token = features.sum(dim=-1).reshape(-1, features.shape[-2]).sum(dim=0)
    return per_token[table].sum(dim=1)


def _gathered(features: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Copy the sub-blocks out of [..., S, D]; float32 [..., K, T, D]."""
    return features[..., table, :].float()


def _channel_range(fresh: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Return the largest less the least value of each channel over both steps; [..., 1, D]."""
    lows, highs = zip(*(features.aminmax(dim=-2, keepdim=True) for features in (fresh, previous)), strict=True)
    return torch.maximum(*highs) - torch.minimum(*lows)


def _bins(values: torch.Tensor) -> torch.Tensor:
    """Return the bin of each value of [K, V] between its row's least and largest; int64 in [0, MI_BINS)."""
    low, high = values.aminmax(dim=1, keepdim=True)
    # A row of one constant has no width; all its values are in the first bin.
    place = (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)
    return (place * MI_BINS).long().clamp_(max=MI_BINS - 1)


def _difference_hash(features: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Compare each value with its left neighbour; bool [..., K, rows, cols - 1, D]. T that is no square is one row."""
    tokens = table.shape[1]
    side = math.isqrt(tokens)
    shape = (side, side) if side * side == tokens else (1, tokens)
    # Not in float32: comparing needs no more than the values' own type.
    blocks = features[..., table, :].unflatten(-2, shape)
    return blocks[..., 1:, :] > blocks[..., :-1, :]
