"""Halo rows: what a convolution at a patch's border needs of the neighbours.

Shapes: B batch, C channels, W columns.
"""

from __future__ import annotations

import torch

from otil_xdit.comm.collectives import Collectives, Neighbours, Pending
from otil_xdit.exchange.bucket_buffers import Direction, TensorSpec
from otil_xdit.exchange.buckets import BucketedLayer, Bucketer
from otil_xdit.method.schedule import Mode
from otil_xdit.method.scratch import ScratchBuffers

HaloRows = tuple[torch.Tensor | None, torch.Tensor | None]
"""Rows above and below a rank's map, each [B, C, rows, W]; None beyond the image's edge."""


class HaloLayer(BucketedLayer):
    """The rows next to this rank's that one convolution needs: `above` of the rank before, `below` of the one after.

    What a displaced step takes for this step's rows r of a neighbour are those of the two steps before, moved on:
    ``r'' + (1 + gain) (r' - r'')``.

    Args:
        exchange: reaches the ranks that hold rows.
        post: carries to them what nobody waits for.
        room: for results and for what is sent at once.
        name: the layer's name in error messages.
        like: this rank's map, [B, C, rows, W].
        above, below: number of rows.
        gain: 0 takes the last rows as they were.
        coded: whether rows that nobody waits for travel in 8 bits a number.
    """

    def __init__(
        self,
        collectives: Collectives,
        bucketer: Bucketer,
        scratch: ScratchBuffers,
        name: str,
        like: torch.Tensor,
        above: int,
        below: int,
        gain: float,
        coded: bool,
    ) -> None:
        batch, channels, _, width = like.shape
        super().__init__()
        self.key = halo_key(like, above, below)
        self._collectives, self._bucketer, self._scratch, self._name = collectives, bucketer, scratch, name
        self._above, self._below, self._gain = above, below, gain
        self._first = collectives.group.rank == 0
        self._last = collectives.group.rank == collectives.group.world_size - 1
        up, down = (batch, channels, above, width), (batch, channels, below, width)
        # Zeros at the image's edges, where nothing is ever received.
        self._received: Neighbours = like.new_zeros(up), like.new_zeros(down)
        self._before: Neighbours = like.new_zeros(up), like.new_zeros(down)
        # The rank before is sent as many rows as come from the one after.
        dtype = torch.float32 if coded else like.dtype
        specs = TensorSpec("previous", down, up, dtype, coded), TensorSpec("next", up, down, dtype, coded)
        self._specs = specs[self._first : 1 if self._last else 2]

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in (*self._received, *self._before))

    def widen(self, x: torch.Tensor, mode: Mode, step: int, kind: str) -> torch.Tensor:
        """`x` with the halo above and below it, [B, C, above + rows + below, W]; zeros beyond the image's edges.

        Args:
            x: [B, C, rows, W] with at least max(above, below) rows.
            mode: ``sync`` waits for the neighbours' rows of this step; ``displaced`` moves those on that were sent a
                step earlier and sends this step's; ``frozen`` keeps what there is.
            step: for error messages, and to part parcels.
            kind: the counter that the bytes go to.

        Returns:
            In a room: read it before the next call of any layer.
        """
        where = f"the halo of layer {self._name} at step {step}"
        self.drain()
        if mode == "sync":
            self._turn()
            self._send(x, self._received, kind, where).wait()
        elif mode == "displaced":
            self._slot = self._bucketer.append(self._specs, step, kind, where, x.device)
            outgoing = (rows for rows in self.rows_to_send(x) if rows is not None)
            for scratch, rows in zip(self._slot.outgoing, outgoing, strict=True):
                scratch.copy_(rows)
        self.num_calls += 1
        return self._widened(x, self._moved_on() if mode == "displaced" else self._received)

    def put(self, x: torch.Tensor, precomputed: HaloRows) -> torch.Tensor:
        """`widen` with rows that are known already: no message. They are kept as those of a synchronous step are."""
        self.drain()
        self._turn()
        for kept, rows in zip(self._received, precomputed, strict=True):
            if rows is not None:
                kept.copy_(rows)
        self.num_calls += 1
        return self._widened(x, self._received)

    def request(self, x: torch.Tensor, kind: str, where: str) -> Pending[Neighbours]:
        """Start exchanging rows of another map of this shape, which `beyond` gives after the wait.

        No other layer may ask for anything in between: what is sent and received lies in room that all use.
        """
        return self._send(x, self._passing(), kind, where)

    def beyond(self) -> HaloRows:
        """Where `request` puts the rows of the neighbours there are; valid until the next exchange."""
        above, below = self._passing()
        return None if self._first else above, None if self._last else below

    def rows_to_send(self, x: torch.Tensor) -> HaloRows:
        """The rows of `x` that the ranks before and after this one need."""
        to_previous = None if self._first else x[:, :, : self._below]
        return to_previous, None if self._last else x[:, :, x.shape[2] - self._above :]

    def _keep(self, direction: Direction, received: torch.Tensor) -> None:
        if direction == self._specs[0].direction:  # the first of what a step brings
            self._turn()
        self._received[direction == "next"].copy_(received[0])

    def _turn(self) -> None:
        """The rows of another step are about to come: the last become those before."""
        self._received, self._before = self._before, self._received
        self._receptions += 1

    def _moved_on(self) -> Neighbours:
        """The last rows, if they go on moving as between the last two steps that are known."""
        if not self._gain or self._receptions < 2:
            return self._received
        for last, before, moved in zip(self._received, self._before, self._passing(), strict=True):
            torch.lerp(before, last, 1 + self._gain, out=moved)  # zeros stay zeros
        return self._passing()

    def _passing(self) -> Neighbours:
        """Room for rows above and below that are not kept."""
        above, below = self._received
        scratch, dtype = self._scratch, above.dtype
        return scratch("rows above", tuple(above.shape), dtype), scratch("rows below", tuple(below.shape), dtype)

    def _widened(self, x: torch.Tensor, beyond: Neighbours) -> torch.Tensor:
        batch, channels, rows, width = x.shape
        shape = (batch, channels, self._above + rows + self._below, width)
        return torch.cat([beyond[0], x, beyond[1]], dim=2, out=self._scratch("wide", shape, x.dtype))

    def _send(self, x: torch.Tensor, into: Neighbours, kind: str, where: str) -> Pending[Neighbours]:
        up, down = self.rows_to_send(x)
        to_previous, to_next = self._packed("rows up", up, x), self._packed("rows down", down, x)
        shares = {kind: to_previous.nbytes}, {kind: to_next.nbytes}
        return self._collectives.neighbours(to_previous, to_next, into, shares, where)

    def _packed(self, scratch: str, rows: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """A contiguous copy; empty for None."""
        if rows is None:
            return self._scratch(scratch, (0,), like.dtype)
        return self._scratch(scratch, tuple(rows.shape), rows.dtype).copy_(rows)


def halo_key(like: torch.Tensor, above: int, below: int) -> tuple[object, ...]:
    """What a `HaloLayer`'s buffers depend on."""
    return (like.shape[0], like.shape[1], like.shape[3], like.dtype, like.device, above, below)
