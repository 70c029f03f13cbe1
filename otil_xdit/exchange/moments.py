"""The small things that a U-Net's patches need of each other: halo rows and moments.

Shapes: B batch, C channels, W columns, G groups, R ranks that hold rows.
"""

from __future__ import annotations

import torch

from otil_xdit.comm.collectives import Collectives, Pending
from otil_xdit.exchange.bucket_buffers import Direction, TensorSpec
from otil_xdit.exchange.buckets import BucketedLayer, Bucketer
from otil_xdit.exchange.halo import HaloLayer, HaloRows
from otil_xdit.method.schedule import Mode

_NEVER = -2
"""Before any number of receptions, and before the one that would answer it."""


class MomentsLayer(BucketedLayer):
    """Mean and variance of whole maps, of which every rank holds some rows, for one group normalisation.

    Args:
        exchange: reaches the ranks that hold rows.
        post: carries to them what nobody waits for.
        name: the layer's name in error messages.
        like: this rank's means, float32 [B, G].
        gain: the most that a displaced step goes on, in the change between the two steps before; 0 takes the last, and
            corrects it as DistriFusion does.
    """

    def __init__(
        self, collectives: Collectives, bucketer: Bucketer, name: str, like: torch.Tensor, gain: float
    ) -> None:
        own, ranks = collectives.group.rank, collectives.group.world_size
        super().__init__()
        self.key = moments_key(like)
        self._collectives, self._bucketer, self._name, self._gain = collectives, bucketer, name, gain
        self._sent = like.new_zeros(2, *like.shape)
        self._all = like.new_zeros(ranks, 2, *like.shape)
        self._before = torch.zeros_like(self._all)
        # What the last displaced step took all ranks' means and mean squares for, and how many receptions came before.
        self._taken = torch.zeros_like(self._all)
        self._taken_at = _NEVER
        # Two ranks are each other's only neighbour: moments travel with the rows.
        direction: Direction = "everybody" if ranks != 2 else "next" if own == 0 else "previous"
        self._specs = (TensorSpec(direction, tuple(self._sent.shape), tuple(self._sent.shape), like.dtype),)
        self._packets: _Packets | None = None

    @property
    def nbytes(self) -> int:
        packets = self._packets.nbytes if self._packets is not None else 0
        return self._sent.nbytes + self._all.nbytes + self._before.nbytes + self._taken.nbytes + packets

    def begin(self) -> None:
        super().begin()
        self._taken_at = _NEVER

    def combine(
        self, mean: torch.Tensor, var: torch.Tensor, share: torch.Tensor, mode: Mode, step: int, kind: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole maps' mean and biased variance.

        ``sync`` combines this step's moments of every rank (exact). ``displaced`` and ``frozen`` combine the moments
        that were sent a step earlier, or last, and correct them by how this rank's own have moved since (DistriFusion,
        CVPR 2024, section 4.3): mean and mean square of all + weight (own fresh - own stale); where the variance would
        be negative, this rank's own.

        In the paper the weight is 1: all maps are taken to move as this rank's part does. The more ranks there are,
        the less that is so, and where each then follows its own part the pictures come apart. So with a gain the
        weight of the means, and that of the mean squares, is what it should have been a step before: the least-squares
        fit of what was missing of the whole by what was missing of this rank's own part, from this rank's share of the
        rows (at which no other rank would move) to 1. And ``displaced`` moves all moments on before, as far as this
        rank's own moved (the least-squares fit of its change by its change of the step before), `gain` at most.

        Args:
            mean, var: this rank's, float32 [B, G], the variance biased.
            share: [R], every rank's share of the rows, summing to 1.
            mode, step, kind: as in `HaloLayer.widen`.

        Returns:
            Two float32 [B, G].
        """
        where = f"the moments of layer {self._name} at step {step}"
        self.drain()
        weights = share[:, None, None]
        if mode == "sync":
            self._turn()
            self._send(mean, var, kind, where).wait()
            result = self._combined(weights)
        else:
            torch.stack([mean, var], out=self._sent)
            weight = self._fitted(weights) if mode == "displaced" and self._gain else 1.0
            taken = _raw(self._moved_on() if mode == "displaced" else self._all, self._taken)
            self._taken_at = self._receptions
            missing = _raw(self._sent, torch.empty_like(self._sent)) - taken[self._collectives.group.rank]
            whole, square = (weights[..., None] * taken).sum(0) + weight * missing
            corrected = square - whole.square()
            result = whole, torch.where(corrected < 0, var, corrected)
        if mode == "displaced":
            self._slot = self._bucketer.append(self._specs, step, kind, where, mean.device)
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
        step: int,
        kinds: tuple[str, str],
    ) -> tuple[torch.Tensor, torch.Tensor, HaloRows]:
        """`combine` in ``sync`` mode, and the rows of `x` beyond this rank's, for one wait.

        Two ranks are each other's only neighbour, so one message carries both. More ranks gather the moments and send
        rows to their neighbours at the same time.

        Args:
            mean, var, share, step: as in `combine`.
            halo: the layer whose rows they are.
            x: the map, [B, C, rows, W].
            kinds: the counters that the bytes of moments and of rows go to.

        Returns:
            Mean and variance, float32 [B, G], and the rows above and below, valid until the next exchange.
        """
        where = f"the moments of layer {self._name} and rows of its map at step {step}"
        self.drain()
        self._turn()
        if self._collectives.group.world_size == 2:
            beyond = self._swap(mean, var, halo, x, kinds, where)
        else:
            moments, rows = self._send(mean, var, kinds[0], where), halo.request(x, kinds[1], where)
            moments.wait()
            rows.wait()
            beyond = halo.beyond()
        self.num_calls += 1
        return *self._combined(share[:, None, None]), beyond

    def _combined(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of the union of all ranks' rows, from the moments of each; `weights` is [R, 1, 1]."""
        means, variances = self._all[:, 0], self._all[:, 1]
        whole = (weights * means).sum(0)
        return whole, (weights * (variances + (means - whole).square())).sum(0)

    def _swap(
        self,
        mean: torch.Tensor,
        var: torch.Tensor,
        halo: HaloLayer,
        x: torch.Tensor,
        kinds: tuple[str, str],
        where: str,
    ) -> HaloRows:
        """Moments and rows from and to the other of two ranks."""
        own = self._collectives.group.rank
        other = 1 - own  # rank 0 has a neighbour below, which is side 1 of a pair of rows; rank 1 has one above, side 0
        outgoing, incoming = halo.rows_to_send(x)[other], halo.beyond()[other]
        assert outgoing is not None and incoming is not None, "each of two ranks has one neighbour"
        if self._packets is None or self._packets.halo_key != halo.key:
            self._packets = _Packets(self._sent, outgoing, incoming, halo.key)
        sent, received = self._packets.sent, self._packets.received
        torch.stack([mean, var], out=self._all[own])
        sent.moments.copy_(self._all[own])
        sent.rows.copy_(outgoing)
        buffers = (received.bytes, received.bytes)  # the one for the neighbour that is not there is not looked at
        shares = {kinds[1]: sent.rows.nbytes, kinds[0]: sent.moments.nbytes}
        self._collectives.neighbours(sent.bytes, sent.bytes, buffers, (shares, shares), where).wait()
        self._all[other].copy_(received.moments)
        return (None, received.rows) if own == 0 else (received.rows, None)

    def _keep(self, direction: Direction, received: torch.Tensor) -> None:
        self._turn()
        if direction == "everybody":
            self._all.copy_(received)
        else:
            own = self._collectives.group.rank
            self._all[1 - own].copy_(received[0])
            self._all[own].copy_(self._sent)

    def _turn(self) -> None:
        """The moments of another step are about to come: the last become those before."""
        self._all, self._before = self._before, self._all
        self._receptions += 1

    def _moved_on(self) -> torch.Tensor:
        """All ranks' last moments, [R, 2, B, G], moved on as far as this rank's own, which are in `_sent`, have."""
        if not self._gain or self._receptions < 2:
            return self._all
        own = self._collectives.group.rank
        velocity = self._all[own] - self._before[own]
        along = (self._sent - self._all[own]).mul_(velocity).sum(-1, keepdim=True)
        gain = along.div_(velocity.square_().sum(-1, keepdim=True).clamp_min_(1e-30)).clamp_(0, self._gain)
        moved = torch.lerp(self._before, self._all, gain.add_(1))
        moved[:, 1].clamp_(min=0)
        return moved

    def _fitted(self, weights: torch.Tensor) -> torch.Tensor:
        """The weights of what is missing of this rank's means and mean squares, [2, 1, 1] or alike; see `combine`."""
        own = self._collectives.group.rank
        if self._receptions != self._taken_at + 1:  # what came last does not answer what was taken last
            return weights[own]
        missed = _raw(self._all, torch.empty_like(self._all)).sub_(self._taken)
        whole = (weights[..., None] * missed).sum(0)
        along = (whole * missed[own]).sum((1, 2), keepdim=True)
        length = missed[own].square().sum((1, 2), keepdim=True).clamp_min_(1e-30)
        return along.div_(length).clamp_(max=1).maximum(weights[own])

    def _send(self, mean: torch.Tensor, var: torch.Tensor, kind: str, where: str) -> Pending[torch.Tensor]:
        torch.stack([mean, var], out=self._sent)
        return self._collectives.all_gather(self._sent, self._all, kind, where)


def _raw(moments: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Means and mean squares of means and variances, both [..., 2, B, G]."""
    mean = out.copy_(moments)[..., 0, :, :]
    out[..., 1, :, :].addcmul_(mean, mean)
    return out


class _Packet:
    """Moments and rows in one buffer of bytes.

    Args:
        moments: float32 [2, B, G]; a multiple of 8 bytes, so rows of any dtype can be viewed behind them.
        rows: [B, C, rows, W] of the map's dtype.
    """

    def __init__(self, moments: torch.Tensor, rows: torch.Tensor) -> None:
        self.bytes = torch.empty(moments.nbytes + rows.nbytes, dtype=torch.uint8, device=rows.device)
        self.moments = self.bytes[: moments.nbytes].view(moments.dtype).view(moments.shape)
        self.rows = self.bytes[moments.nbytes :].view(rows.dtype).view(rows.shape)


class _Packets:
    """What one of two ranks sends for a pair of layers, and what it receives."""

    def __init__(
        self, moments: torch.Tensor, outgoing: torch.Tensor, incoming: torch.Tensor, halo_key: tuple[object, ...]
    ) -> None:
        self.sent, self.received = _Packet(moments, outgoing), _Packet(moments, incoming)
        self.halo_key = halo_key

    @property
    def nbytes(self) -> int:
        return self.sent.bytes.nbytes + self.received.bytes.nbytes


def moments_key(like: torch.Tensor) -> tuple[object, ...]:
    """What a `MomentsLayer`'s buffers depend on."""
    return (like.shape, like.device)
