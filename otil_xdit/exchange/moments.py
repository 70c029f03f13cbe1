"""Moments: mean and variance of whole maps for a group normalisation, of which every rank holds some rows.

Shapes: B batch, C channels, W columns, G groups, R ranks that hold rows.
"""

from __future__ import annotations

import torch

from otil_xdit.comm.collectives import CollectiveLabel, Collectives, Pending
from otil_xdit.exchange.bucket_buffers import Direction, TensorSpec
from otil_xdit.exchange.buckets import BucketedLayer, Bucketer
from otil_xdit.exchange.halo import HaloLayer, HaloRows
from otil_xdit.exchange.known_moments import Fit, KnownMoments, RankWeights, combined_moments, mean_and_variance
from otil_xdit.exchange.swap_buffers import SwapBuffers
from otil_xdit.method.kernels import is_fused
from otil_xdit.method.schedule import Mode

_NEVER = -2
"""Before any number of receptions, and before the one that would answer it."""


class MomentsLayer(BucketedLayer):
    """The moments of one group normalisation.

    Over 200 lines: what came, what was assumed and what that tells of this rank's weight are one state.

    DistriFusion (CVPR 2024, section 4.3) adds this rank's change to the global moments with weight 1: it assumes that
    every patch changes like this one. The more ranks, the less that holds, and images diverge. With a gain the weight
    is fitted instead: least squares of the global error on this rank's error in the previous step, clamped to [this
    rank's share of the rows, 1]. At its share no other rank would change; at 1 all change alike.

    Args:
        collectives: of the ranks that hold rows.
        bucketer: carries to them what nobody waits for.
        like: this rank's means, float32 [B, G].
        gain: the most that a displaced step extrapolates the change between the two steps before. 0 takes the last
            moments, and corrects them as DistriFusion does.
    """

    def __init__(self, collectives: Collectives, bucketer: Bucketer, like: torch.Tensor, gain: float) -> None:
        own, ranks = collectives.group.rank, collectives.group.world_size
        super().__init__()
        self.key = moments_key(like)
        self._collectives, self._bucketer, self._gain, self._own = collectives, bucketer, gain, own
        self._sent = like.new_zeros(2, *like.shape)
        self._sent_mean, self._sent_var = self._sent.unbind(0)
        self._last, self._before = KnownMoments(like, ranks), KnownMoments(like, ranks)
        # All ranks' means and mean squares as the last displaced step assumed them, and the receptions before it.
        self._assumption = KnownMoments(like, ranks)
        self._assumed_at = _NEVER
        # What the eager way computes in: how far all ranks were from what was assumed, and this rank of now.
        self._missed, self._present = KnownMoments(like, ranks), KnownMoments(like, 1)
        self._error, self._change = Fit(like, (-2, -1)), Fit(like, (-1,))
        self._weights: RankWeights | None = None
        # Two ranks are each other's only neighbour: moments travel with the rows.
        direction: Direction = "everybody" if ranks != 2 else "next" if own == 0 else "previous"
        self._specs = (TensorSpec(direction, tuple(self._sent.shape), tuple(self._sent.shape), like.dtype),)
        self._swap_buffers: SwapBuffers | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device."""
        swapped = self._swap_buffers.nbytes if self._swap_buffers is not None else 0
        known = (self._last, self._before, self._assumption, self._missed, self._present)
        fits = self._error.nbytes + self._change.nbytes
        return self._sent.nbytes + sum(moments.all.nbytes for moments in known) + fits + swapped

    @property
    def _received(self) -> torch.Tensor:
        """Everybody's last moments, [R, 2, B, G]."""
        return self._last.all

    @property
    def _received_before(self) -> torch.Tensor:
        """Those before, [R, 2, B, G]."""
        return self._before.all

    @property
    def _assumed(self) -> torch.Tensor:
        """Everybody's means and mean squares as the last displaced step assumed them, [R, 2, B, G]."""
        return self._assumption.all

    def begin(self) -> None:
        super().begin()
        self._assumed_at = _NEVER

    def combine(
        self, mean: torch.Tensor, var: torch.Tensor, share: torch.Tensor, mode: Mode, label: CollectiveLabel
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the whole maps' mean and biased variance.

        Args:
            mean, var: this rank's, float32 [B, G], the variance biased.
            share: float32 [R], every rank's share of the rows, summing to 1.
            mode: ``sync`` combines this step's moments of every rank, which is exact. ``displaced`` and ``frozen``
                correct the moments that were sent a step earlier, or last, by this rank's change since.
            label: of the moments.

        Returns:
            Two float32 [B, G].
        """
        self.apply_pending()
        if mode == "sync":
            self._begin_reception()
            self._send(mean, var, label).wait()
            result = self._combined(share)
        else:
            correct = self._corrected_by_kernel if is_fused(mean) else self._corrected
            result = correct(mean, var, share, extrapolate=mode == "displaced")
        if mode == "displaced":
            self._slot = self._bucketer.append(self._specs, label, mean.device)
            self._slot.outgoing[0].copy_(self._sent)
        self.num_calls += 1
        return result

    def combine_with_rows(
        self,
        mean: torch.Tensor,
        var: torch.Tensor,
        share: torch.Tensor,
        halo: HaloLayer,
        x: torch.Tensor,
        labels: tuple[CollectiveLabel, CollectiveLabel],
    ) -> tuple[torch.Tensor, torch.Tensor, HaloRows]:
        """Return what `combine` does in ``sync`` mode, and the neighbours' rows of `x`, for one wait.

        Two ranks are each other's only neighbour, so one message carries both. More ranks gather the moments and send
        rows to their neighbours at the same time.

        Args:
            mean, var, share: as in `combine`.
            halo: the layer whose rows they are.
            x: the map, [B, C, rows, W].
            labels: of the moments and of the rows.

        Returns:
            Mean and variance, float32 [B, G], and the rows above and below, valid until the next exchange.
        """
        self.apply_pending()
        self._begin_reception()
        self.num_calls += 1
        if self._collectives.group.world_size == 2:
            return self._swap(mean, var, share, halo, x, labels)
        if is_fused(x):
            request_rows = halo.request_with_moments(x, (mean, var), self._sent, labels[1])
            pending = self._gather(labels[0]), request_rows()
        else:
            pending = self._send(mean, var, labels[0]), halo.request(x, labels[1])
        for message in pending:
            message.wait()
        return *self._combined(share), halo.requested_rows()

    def _corrected(
        self, mean: torch.Tensor, var: torch.Tensor, share: torch.Tensor, extrapolate: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and variance from the last moments and this rank's, which become those in `_sent`.

        Mean and mean square of all + weight (own fresh - own stale). Where the variance would be negative, this rank's
        own stands in.
        """
        # Two copies take less than a `stack` here, on the CPU; where kernels are, `_send` stacks in one launch.
        self._sent_mean.copy_(mean)
        self._sent_var.copy_(var)
        weights, assumed, present = self._weights_of(share), self._assumption, self._present
        weight = self._fitted_weights(weights) if extrapolate and self._gain else weights.one
        self._assume(extrapolate)
        self._assumed_at = self._receptions
        own = present.of[0].copy_(self._sent)
        present.make_raw()
        missing = own.sub_(assumed.of[self._own])
        known = (assumed.all * weights.of_moments).sum(0)
        whole, square = known.addcmul_(missing, weight).unbind(0)
        variance = square - whole * whole
        return whole, torch.where(variance < weights.zero, var, variance)

    def _corrected_by_kernel(
        self, mean: torch.Tensor, var: torch.Tensor, share: torch.Tensor, extrapolate: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `_corrected` does, in one launch."""
        from otil_xdit.method.kernels.moments import FITTED, ONE, SHARE, correct_moments

        extrapolated = extrapolate and bool(self._gain) and self._receptions >= 2
        answers = self._receptions == self._assumed_at + 1
        weight = ONE if not (extrapolate and self._gain) else FITTED if answers else SHARE
        self._assumed_at = self._receptions
        whole = torch.empty_like(mean), torch.empty_like(var)
        known = self._received, self._received_before, self._assumed, self._sent
        correct_moments(mean, var, share, *known, self._own, self._gain, extrapolated, weight, *whole)
        return whole

    def _assume(self, extrapolate: bool) -> None:
        """Assume that all ranks' moments are the last, moved on as far as this rank's own, in `_sent`, have moved.

        That is the least-squares fit of its change by its change of the step before, the gain at most.
        """
        assumed, last, before = self._assumption, self._last, self._before
        if not extrapolate or not self._gain or self._receptions < 2:
            assumed.set_raw(last)
            return
        change, moved = self._change, torch.sub(last.all, before.all, out=assumed.all)
        change.by.copy_(assumed.of[self._own])
        torch.sub(self._sent, last.of[self._own], out=change.fitted)
        torch.addcmul(last.all, moved, change.factor().clamp_(0, self._gain), out=assumed.all)
        assumed.squares.clamp_min_(0)
        assumed.make_raw()

    def _fitted_weights(self, weights: RankWeights) -> torch.Tensor:
        """Return the weights of this rank's error in means and mean squares, [2, 1, 1] or alike; see the class."""
        if self._receptions != self._assumed_at + 1:  # what came last does not answer what was assumed last
            return weights.own
        missed, last, error = self._missed, self._last, self._error
        torch.sub(last.all, self._assumption.all, out=missed.all)
        missed.squares.addcmul_(last.means, last.means)  # the last are variances, what was assumed mean squares
        error.by.copy_(missed.of[self._own])
        torch.sum(missed.all * weights.of_moments, 0, out=error.fitted)
        return torch.clamp(error.factor(), weights.own, weights.one)

    def _combined(
        self, share: torch.Tensor, came: tuple[int, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `combined_moments` does of the last moments."""
        if is_fused(share):
            return combined_moments(self._received, share, came)
        if came is not None:
            self._last.of[came[0]].copy_(came[1])
        return mean_and_variance(self._last.means, self._last.squares, self._weights_of(share).of_maps)

    def _weights_of(self, share: torch.Tensor) -> RankWeights:
        if self._weights is None or self._weights.share is not share:
            self._weights = RankWeights(share, self._own)
        return self._weights

    def _send(self, mean: torch.Tensor, var: torch.Tensor, label: CollectiveLabel) -> Pending[torch.Tensor]:
        torch.stack([mean, var], out=self._sent)
        return self._gather(label)

    def _gather(self, label: CollectiveLabel) -> Pending[torch.Tensor]:
        return self._collectives.all_gather(self._sent, self._received, label)

    def _swap(
        self,
        mean: torch.Tensor,
        var: torch.Tensor,
        share: torch.Tensor,
        halo: HaloLayer,
        x: torch.Tensor,
        labels: tuple[CollectiveLabel, CollectiveLabel],
    ) -> tuple[torch.Tensor, torch.Tensor, HaloRows]:
        """Do what `combine_with_rows` does with the other of two ranks."""
        own, other = self._own, 1 - self._own
        # Rank 0 has a neighbour below, which is side 1 of a pair of rows; rank 1 has one above, side 0.
        outgoing, incoming = halo.rows_to_send(x)[other], halo.requested_rows()[other]
        assert outgoing is not None and incoming is not None, "each of two ranks has one neighbour"
        if self._swap_buffers is None or self._swap_buffers.halo_key != halo.key:
            self._swap_buffers = SwapBuffers(self._sent, outgoing, incoming, halo.key)
        sent, received, kept = self._swap_buffers.sent, self._swap_buffers.received, self._last.of[own]
        if is_fused(x):
            from otil_xdit.method.kernels.rows import pack_rows

            pack_rows(mean, var, kept, sent.moments, outgoing, sent.rows, None, None)
        else:
            torch.stack([mean, var], out=kept)
            sent.moments.copy_(kept)
            sent.rows.copy_(outgoing)
        buffers = (received.bytes, received.bytes)  # the one for the neighbour that is not there is not looked at
        shares = {labels[1].counter: sent.rows.nbytes, labels[0].counter: sent.moments.nbytes}
        self._collectives.neighbours(sent.bytes, sent.bytes, buffers, (shares, shares), labels[0]).wait()
        rows = (None, received.rows) if own == 0 else (received.rows, None)
        return *self._combined(share, (other, received.moments)), rows

    def _apply(self, direction: Direction, received: torch.Tensor) -> None:
        self._begin_reception()
        if direction == "everybody":
            self._received.copy_(received)
        else:
            self._last.of[1 - self._own].copy_(received[0])
            self._last.of[self._own].copy_(self._sent)

    def _begin_reception(self) -> None:
        """Make the last moments those before, whose buffer the next step's moments overwrite."""
        self._last, self._before = self._before, self._last
        self._receptions += 1


def moments_key(like: torch.Tensor) -> tuple[object, ...]:
    """Return what a `MomentsLayer`'s buffers depend on."""
    return (like.shape, like.device)
