"""`SynchronousExchange`: rows, moments and tokens of other ranks, all of this moment and waited for.

For networks that run once an image, such as a VAE, where nothing of an earlier step could stand in.

Shapes: B batch, C channels, W columns, G groups, R ranks that hold rows.
"""

from __future__ import annotations

import torch

from otil_xdit.comm.collectives import CollectiveLabel, Collectives
from otil_xdit.exchange.known_moments import combined_moments


class SynchronousExchange:
    """Exact exchange between the ranks that share a map by rows.

    Args:
        collectives: of these ranks, in the order of their rows.
        kind: the counter of all messages.
    """

    def __init__(self, collectives: Collectives, kind: str) -> None:
        self._collectives, self._kind = collectives, kind

    @property
    def rank(self) -> int:
        return self._collectives.group.rank

    @property
    def ranks(self) -> int:
        return self._collectives.group.world_size

    def halo(self, name: str, x: torch.Tensor, above: int, below: int) -> torch.Tensor:
        """Return a map between the rows that its neighbours have above and below it, and zeros beyond the image.

        Args:
            name: of the layer, for errors.
            x: this rank's map, [B, C, rows, W], with at least max(above, below) rows.
            above, below: number of rows of the rank before and of the one after.

        Returns:
            [B, C, above + rows + below, W].
        """
        batch, channels, rows, width = x.shape
        upper, lower = (x.new_zeros(batch, channels, count, width) for count in (above, below))
        nothing = x.new_empty(0)
        to_previous = x[:, :, :below].contiguous() if self.rank > 0 else nothing
        to_next = x[:, :, rows - above :].contiguous() if self.rank < self.ranks - 1 else nothing
        label = self._label(f"the halo of layer {name}")
        shares = {label.counter: to_previous.nbytes}, {label.counter: to_next.nbytes}
        self._collectives.neighbours(to_previous, to_next, (upper, lower), shares, label).wait()
        return torch.cat([upper, x, lower], dim=2)

    def moments(
        self, name: str, mean: torch.Tensor, var: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the whole maps' mean and biased variance from this rank's, all float32 [B, G].

        Args:
            name: of the layer, for errors.
            mean, var: of this rank's rows.
            share: [R], every rank's share of the rows.
        """
        return combined_moments(self.gather(f"the moments of layer {name}", torch.stack([mean, var])), share)

    def gather(self, what: str, part: torch.Tensor) -> torch.Tensor:
        """Return every rank's tensor of this shape, [R, *part.shape]; errors name `what`."""
        part = part.contiguous()
        out = part.new_empty(self.ranks, *part.shape)
        return self._collectives.all_gather(part, out, self._label(what)).wait()

    def send(self, what: str, payload: torch.Tensor, peer: int) -> None:
        """Send a tensor to the rank `peer`, which receives one of this shape; errors name `what`."""
        self._collectives.send(payload.contiguous(), peer, self._label(what)).wait()

    def receive(self, what: str, output: torch.Tensor, peer: int) -> torch.Tensor:
        """Return `output`, filled with what the rank `peer` sends; errors name `what`."""
        return self._collectives.receive(output, peer, self._label(what)).wait()

    def _label(self, what: str) -> CollectiveLabel:
        return CollectiveLabel(self._kind, what, None)
