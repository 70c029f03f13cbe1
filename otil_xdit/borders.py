"""The small things that a U-Net's patches need of each other: halo rows and moments.

Shapes: B batch, C channels, W columns, G groups, R ranks that hold rows.
"""

from __future__ import annotations

import torch

from otil_xdit.exchange import Exchange, ExchangedLayer, Neighbours, Pending
from otil_xdit.schedule import Mode


class HaloLayer(ExchangedLayer[Neighbours]):
    """The rows next to this rank's that one convolution needs: `above` of the rank before, `below` of the one after.

    Args:
        exchange: reaches the ranks that hold rows.
        name: the layer's name in error messages.
        like: this rank's map, [B, C, rows, W].
        above, below: number of rows.
    """

    def __init__(self, exchange: Exchange, name: str, like: torch.Tensor, above: int, below: int) -> None:
        batch, channels, _, width = like.shape
        super().__init__()
        self.key = halo_key(like, above, below)
        self._exchange, self._name = exchange, name
        self._above, self._below = above, below
        self._first = exchange.group.rank == 0
        self._last = exchange.group.rank == exchange.group.world_size - 1
        # Zeros at the image's edges, where nothing is ever received.
        self._received: Neighbours = (
            like.new_zeros(batch, channels, above, width),
            like.new_zeros(batch, channels, below, width),
        )

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._received)

    def widen(self, x: torch.Tensor, mode: Mode, step: int, kind: str) -> torch.Tensor:
        """`x` with the halo above and below it, [B, C, above + rows + below, W]; zeros beyond the image's edges.

        Args:
            x: [B, C, rows, W] with at least max(above, below) rows.
            mode: ``sync`` waits for the neighbours' rows of this step; ``displaced`` takes those that were sent a step
                earlier and sends this step's; ``frozen`` keeps what there is.
            step: for error messages.
            kind: the counter that the bytes go to.
        """
        where = f"the halo of layer {self._name} at step {step}"
        self.drain()
        if mode == "sync":
            self._send(x, kind, where).wait()
        widened = torch.cat([self._received[0], x, self._received[1]], dim=2)
        if mode == "displaced":
            # After the copy: what arrives from now on belongs to the next step.
            self._pending = self._send(x, kind, where)
        self.visits += 1
        return widened

    def _send(self, x: torch.Tensor, kind: str, where: str) -> Pending[Neighbours]:
        empty = x.new_empty(0)
        to_previous = empty if self._first else x[:, :, : self._below].contiguous()
        to_next = empty if self._last else x[:, :, x.shape[2] - self._above :].contiguous()
        return self._exchange.neighbours(to_previous, to_next, self._received, kind, where)


def halo_key(like: torch.Tensor, above: int, below: int) -> tuple[object, ...]:
    """What a `HaloLayer`'s buffers depend on."""
    return (like.shape[0], like.shape[1], like.shape[3], like.dtype, like.device, above, below)


class MomentsLayer(ExchangedLayer[torch.Tensor]):
    """Mean and variance of whole maps, of which every rank holds some rows, for one group normalisation.

    Args:
        exchange: reaches the ranks that hold rows.
        name: the layer's name in error messages.
        like: this rank's means, float32 [B, G].
    """

    def __init__(self, exchange: Exchange, name: str, like: torch.Tensor) -> None:
        ranks = exchange.group.world_size
        super().__init__()
        self.key = moments_key(like)
        self._exchange, self._name = exchange, name
        self._sent = like.new_zeros(2, *like.shape)
        self._all = like.new_zeros(ranks, 2, *like.shape)

    @property
    def nbytes(self) -> int:
        return self._sent.nbytes + self._all.nbytes

    def combine(
        self, mean: torch.Tensor, var: torch.Tensor, share: torch.Tensor, mode: Mode, step: int, kind: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole maps' mean and biased variance.

        ``sync`` combines this step's moments of every rank (exact). ``displaced`` and ``frozen`` combine the moments
        that were sent a step earlier, or last, and correct them by how this rank's own have moved since (DistriFusion,
        CVPR 2024, section 4.3): mean and mean square of all + (own fresh - own stale); where the variance would be
        negative, this rank's own.

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
            self._send(mean, var, kind, where).wait()
            means, variances = self._all[:, 0], self._all[:, 1]
            whole = (weights * means).sum(0)
            result = whole, (weights * (variances + (means - whole).square())).sum(0)
        else:
            means, squares = self._all[:, 0], self._all[:, 1] + self._all[:, 0].square()
            own = self._exchange.group.rank
            whole = (weights * means).sum(0) + mean - means[own]
            square = (weights * squares).sum(0) + var + mean.square() - squares[own]
            corrected = square - whole.square()
            result = whole, torch.where(corrected < 0, var, corrected)
        if mode == "displaced":
            self._pending = self._send(mean, var, kind, where)
        self.visits += 1
        return result

    def _send(self, mean: torch.Tensor, var: torch.Tensor, kind: str, where: str) -> Pending[torch.Tensor]:
        torch.stack([mean, var], out=self._sent)
        return self._exchange.all_gather(self._sent, self._all, kind, where)


def moments_key(like: torch.Tensor) -> tuple[object, ...]:
    """What a `MomentsLayer`'s buffers depend on."""
    return (like.shape, like.device)
