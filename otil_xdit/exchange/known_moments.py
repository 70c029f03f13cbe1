"""Moments of all ranks, with the views of them that are computed with.

They are few numbers, so making a view of them takes as long as computing with it: a buffer's views are made once.

Shapes: R ranks that hold rows, B batch, G groups.
"""

from __future__ import annotations

import torch

from otil_xdit.method.kernels import is_fused


class KnownMoments:
    """Means and variances, or means and mean squares, of all ranks.

    Args:
        like: one rank's means, float32 [B, G].
        ranks: R.

    Attributes:
        all: [R, 2, B, G].
        of: of each rank, [2, B, G].
        means, squares: [R, B, G]; the latter are variances where `all` has these.
    """

    def __init__(self, like: torch.Tensor, ranks: int) -> None:
        self.all = like.new_zeros(ranks, 2, *like.shape)
        self.of = self.all.unbind(0)
        self.means, self.squares = self.all.unbind(1)

    def set_raw(self, other: KnownMoments) -> None:
        """Become means and mean squares by means and variances."""
        self.all.copy_(other.all)
        self.make_raw()

    def make_raw(self) -> None:
        """Replace the variances by mean squares."""
        self.squares.addcmul_(self.means, self.means)


class RankWeights:
    """What each rank's moments count for: its share of the rows.

    Args:
        share: float32 [R], summing to 1.
        own: this rank.

    Attributes:
        share: as given.
        of_maps: [R, 1, 1].
        of_moments: [R, 1, 1, 1].
        own: [1, 1].
        one, zero: the most and the least that any can be, [].
    """

    def __init__(self, share: torch.Tensor, own: int) -> None:
        self.share = share
        self.of_maps = share[:, None, None]
        self.of_moments = self.of_maps[..., None]
        self.own = self.of_maps[own]
        self.one, self.zero = share.new_ones(()), share.new_zeros(())


class Fit:
    """A least-squares fit of one kind of moments by another: their product over the square of the latter.

    Args:
        like: one rank's means, float32 [B, G].
        dims: dimensions of [2, B, G], counted from the last, that share a factor.

    Attributes:
        fitted, by: [2, B, G], to be filled.
    """

    def __init__(self, like: torch.Tensor, dims: tuple[int, ...]) -> None:
        self._both, self._dims = like.new_zeros(2, 2, *like.shape), dims
        self.fitted, self.by = self._both.unbind(0)
        self._sums = self._both.sum(dims, keepdim=True)
        self._along, self._length = self._sums.unbind(0)

    @property
    def nbytes(self) -> int:
        return self._both.nbytes + self._sums.nbytes

    def factor(self) -> torch.Tensor:
        """Return the factors of `by`, [2, B, G] with the dimensions that share one being 1, until the next call."""
        torch.sum(self._both * self.by, self._dims, keepdim=True, out=self._sums)
        return self._along.div_(self._length.clamp_min_(1e-30))


def combined_moments(
    received: torch.Tensor, share: torch.Tensor, came: tuple[int, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and biased variance of all ranks' rows together, float32 [B, G].

    Args:
        received: the moments of each rank's rows, float32 [R, 2, B, G].
        share: float32 [R], every rank's share of the rows.
        came: a rank and its moments, [2, B, G], which `received` takes in first.
    """
    if is_fused(share):
        from otil_xdit.method.kernels.group_norm import combine_moments

        other, moments = (0, None) if came is None else came
        mean, var = combine_moments(received, share, moments, other)
        return mean, var
    if came is not None:
        received[came[0]].copy_(came[1])
    return mean_and_variance(received[:, 0], received[:, 1], share[:, None, None])


def mean_and_variance(
    means: torch.Tensor, variances: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both of all ranks' rows together, [B, G], from each rank's, [R, B, G], and weights, [R, 1, 1]."""
    whole = (weights * means).sum(0)
    apart = means - whole
    return whole, torch.addcmul(variances, apart, apart).mul_(weights).sum(0)
