"""Halo rows: the neighbours' rows that a convolution at a patch's border reads.

Shapes: B batch, C channels, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from otil_xdit.comm.collectives import CollectiveLabel, Collectives, Neighbours, Pending
from otil_xdit.exchange.bucket_buffers import Direction, TensorSpec
from otil_xdit.exchange.buckets import BucketedLayer, Bucketer
from otil_xdit.method.kernels import is_fused
from otil_xdit.method.memory_format import is_channels_last
from otil_xdit.method.schedule import Mode
from otil_xdit.method.scratch import ScratchBuffers

HaloRows = tuple[torch.Tensor | None, torch.Tensor | None]
"""Rows above and below a rank's map, each [B, C, rows, W]; None beyond the image's edge."""


class HaloLayer(BucketedLayer):
    """The rows next to this rank's that one convolution needs: `above` of the rank before, `below` of the one after.

    A displaced step extrapolates a neighbour's rows from those of the two before: ``r'' + (1 + gain) (r' - r'')``.

    Args:
        collectives: of the ranks that hold rows.
        bucketer: carries to them what nobody waits for.
        scratch: for results and for what is sent at once.
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
        like: torch.Tensor,
        above: int,
        below: int,
        gain: float,
        coded: bool,
    ) -> None:
        batch, channels, _, width = like.shape
        super().__init__()
        self.key = halo_key(like, above, below)
        self._collectives, self._bucketer, self._scratch = collectives, bucketer, scratch
        self._above, self._below, self._gain = above, below, gain
        self._first = collectives.group.rank == 0
        self._last = collectives.group.rank == collectives.group.world_size - 1
        up, down = (batch, channels, above, width), (batch, channels, below, width)
        # Zeros at the image's edges, where nothing is ever received.
        self._received: Neighbours = like.new_zeros(up), like.new_zeros(down)
        self._received_before: Neighbours = like.new_zeros(up), like.new_zeros(down)
        # The rank before is sent as many rows as come from the one after.
        self._coded = coded
        dtype = torch.float32 if coded and not is_fused(like) else like.dtype
        specs = TensorSpec("previous", down, up, dtype, coded), TensorSpec("next", up, down, dtype, coded)
        self._specs = specs[self._first : 1 if self._last else 2]

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device."""
        return sum(rows.nbytes for rows in (*self._received, *self._received_before))

    def pad_with_halo(self, x: torch.Tensor, mode: Mode, label: CollectiveLabel, room: Room = None) -> torch.Tensor:
        """Return `x` with the halo above and below it; zeros beyond the image's edges.

        Args:
            x: [B, C, rows, W] with at least max(above, below) rows.
            mode: ``sync`` waits for the neighbours' rows of this step; ``displaced`` extrapolates those that were sent
                a step earlier and sends this step's; ``frozen`` takes the last.
            label: of the rows.
            room: that `x` lies in, if it lies in any.

        Returns:
            [B, C, above + rows + below, W] in the memory format of `x`, in scratch: valid until the next call of any
            layer.
        """
        self.apply_pending()
        if mode == "sync":
            self._begin_reception()
            self._send(x, self._received, label).wait()
        elif mode == "displaced":
            self._append_to_bucket(x, label)
        self.num_calls += 1
        if is_fused(x):
            is_moved = mode == "displaced" and self._gain > 0 and self._receptions >= 2
            return self._padded_by_kernel(x, (None, None), is_moved, room)
        return self._padded(x, self._extrapolated() if mode == "displaced" else self._received)

    def set_halo(self, x: torch.Tensor, precomputed: HaloRows, room: Room = None) -> torch.Tensor:
        """Return `x` padded with rows that are known on every rank alike, without a message.

        The rows are kept as those of a synchronous step are. Shapes as in `pad_with_halo`.
        """
        self.apply_pending()
        self._begin_reception()
        self.num_calls += 1
        if is_fused(x):
            return self._padded_by_kernel(x, precomputed, False, room)
        for kept, rows in zip(self._received, precomputed, strict=True):
            if rows is not None:
                kept.copy_(rows)
        return self._padded(x, self._received)

    def request(self, x: torch.Tensor, label: CollectiveLabel) -> Pending[Neighbours]:
        """Start exchanging rows of another map of this shape; `requested_rows` returns them after the wait.

        No other layer may exchange anything in between: what is sent and received lies in scratch that all use.
        """
        return self._send(x, self._scratch_rows(), label)

    def requested_rows(self) -> HaloRows:
        """Return the rows that `request` fills; valid until the next exchange."""
        above, below = self._scratch_rows()
        return None if self._first else above, None if self._last else below

    def rows_to_send(self, x: torch.Tensor) -> HaloRows:
        """Return the rows of `x` that the ranks before and after this one need."""
        to_previous = None if self._first else x[:, :, : self._below]
        return to_previous, None if self._last else x[:, :, x.shape[2] - self._above :]

    def _append_to_bucket(self, x: torch.Tensor, label: CollectiveLabel) -> None:
        self._slot = self._bucketer.append(self._specs, label, x.device)
        outgoing = (rows for rows in self.rows_to_send(x) if rows is not None)
        for sent, rows in zip(self._slot.outgoing, outgoing, strict=True):
            sent.copy_(rows)

    def _apply(self, direction: Direction, received: torch.Tensor) -> None:
        if direction == self._specs[0].direction:  # the first of what a step brings
            self._begin_reception()
        if self._coded and is_fused(received):  # decoded into a buffer that nothing else is written to
            above, below = self._received
            self._received = (above, received[0]) if direction == "next" else (received[0], below)
        else:
            self._received[direction == "next"].copy_(received[0])

    def _begin_reception(self) -> None:
        """Make the last rows those before, whose buffers the next step's rows overwrite."""
        self._received, self._received_before = self._received_before, self._received
        self._receptions += 1

    def _extrapolated(self) -> Neighbours:
        """Return the last rows, moved on as between the last two steps that are known."""
        if not self._gain or self._receptions < 2:
            return self._received
        above, below = self._received
        moved_above, moved_below = self._scratch_rows()
        # Beyond the image's edge there are zeros, which stay.
        if not self._first:
            above = torch.lerp(self._received_before[0], above, 1 + self._gain, out=moved_above)
        if not self._last:
            below = torch.lerp(self._received_before[1], below, 1 + self._gain, out=moved_below)
        return above, below

    def _scratch_rows(self) -> Neighbours:
        """Return scratch for rows above and below that are not kept."""
        above, below = self._received
        scratch, dtype = self._scratch, above.dtype
        return scratch("rows above", tuple(above.shape), dtype), scratch("rows below", tuple(below.shape), dtype)

    def _padded(self, x: torch.Tensor, halo: Neighbours) -> torch.Tensor:
        return torch.cat([halo[0], x, halo[1]], dim=2, out=self._wide(x))

    def _padded_by_kernel(self, x: torch.Tensor, given: HaloRows, is_moved: bool, room: Room) -> torch.Tensor:
        """Keep rows that are given, move the others on if they are to be, and return `_padded`, in one launch."""
        from otil_xdit.method.kernels.joined_rows import join_rows
        from otil_xdit.method.kernels.rows import pad_rows

        (above, below), (above_before, below_before) = self._received, self._received_before
        # Beyond the image's edge there are zeros, which stay.
        moves = is_moved and not self._first, is_moved and not self._last
        rows = above, above_before, given[0], below, below_before, given[1], self._gain, *moves
        if room is not None:
            join_rows(room.top, room.bottom, *rows)
            return room.whole
        wide = self._wide(x)
        pad_rows(x, wide, *rows)
        return wide

    def _wide(self, x: torch.Tensor) -> torch.Tensor:
        """Return scratch for a map with its halo, in the memory format of `x`."""
        return _wide("wide", x, self._above + self._below, is_channels_last(x), self._scratch)

    def request_with_moments(
        self, x: torch.Tensor, moments: tuple[torch.Tensor, torch.Tensor], kept: torch.Tensor, label: CollectiveLabel
    ) -> Callable[[], Pending[Neighbours]]:
        """Write moments and the rows that are to be sent where they belong in one launch; what is returned sends these.

        Args:
            x, label: as of `request`.
            moments: mean and variance, float32 [B, G].
            kept: becomes them, [2, B, G].
        """
        from otil_xdit.method.kernels.rows import pack_rows

        up, down = self.rows_to_send(x)
        to_previous, to_next = _room_for((up, down), x.dtype, self._scratch)
        pack_rows(
            *moments, kept, None, up, None if up is None else to_previous, down, None if down is None else to_next
        )
        return lambda: self._send_packed(to_previous, to_next, self._scratch_rows(), label)

    def _send(self, x: torch.Tensor, output: Neighbours, label: CollectiveLabel) -> Pending[Neighbours]:
        sent = self.rows_to_send(x)
        packed = _room_for(sent, x.dtype, self._scratch)
        for room, rows in zip(packed, sent, strict=True):
            if rows is not None:
                room.copy_(rows)
        return self._send_packed(*packed, output, label)

    def _send_packed(
        self, to_previous: torch.Tensor, to_next: torch.Tensor, output: Neighbours, label: CollectiveLabel
    ) -> Pending[Neighbours]:
        shares = {label.counter: to_previous.nbytes}, {label.counter: to_next.nbytes}
        return self._collectives.neighbours(to_previous, to_next, output, shares, label)


@dataclass(frozen=True)
class PaddedRoom:
    """Room for a map between the rows that its convolution reads above and below it, to be written there at once.

    It is scratch of its own: valid until room is wanted for another map, whatever other layers do.

    Attributes:
        whole: [B, C, above + rows + below, W].
        top, inside, bottom: the parts of it.
    """

    whole: torch.Tensor
    top: torch.Tensor
    inside: torch.Tensor
    bottom: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, above: int, below: int, is_last: bool, scratch: ScratchBuffers) -> PaddedRoom:
        """Return the room for a map like `x`, [B, C, rows, W], with its channels last in memory or not."""
        whole, end = _wide("wide map", x, above + below, is_last, scratch), above + x.shape[2]
        return cls(whole, whole[:, :, :above], whole[:, :, above:end], whole[:, :, end:])

    def holds(self, x: torch.Tensor, above: int, below: int) -> bool:
        """Tell whether a map was written here, with room for so many rows above and below it."""
        return x is self.inside and (self.top.shape[2], self.bottom.shape[2]) == (above, below)


Room = PaddedRoom | None
"""Where a map lies, if it lies in any."""


def _wide(name: str, x: torch.Tensor, more: int, is_last: bool, scratch: ScratchBuffers) -> torch.Tensor:
    """Return scratch for a map like `x` with `more` rows, its channels last in memory or not."""
    batch, channels, rows, width = x.shape
    if is_last:
        return scratch(name, (batch, rows + more, width, channels), x.dtype).permute(0, 3, 1, 2)
    return scratch(name, (batch, channels, rows + more, width), x.dtype)


def halo_key(like: torch.Tensor, above: int, below: int) -> tuple[object, ...]:
    """Return what a `HaloLayer`'s buffers depend on."""
    return (like.shape[0], like.shape[1], like.shape[3], like.dtype, like.device, above, below)


def _room_for(sent: HaloRows, dtype: torch.dtype, scratch: ScratchBuffers) -> Neighbours:
    """Return scratch for contiguous copies of rows; empty for None."""
    up, down = ((0,) if rows is None else tuple(rows.shape) for rows in sent)
    return scratch("rows up", up, dtype), scratch("rows down", down, dtype)
