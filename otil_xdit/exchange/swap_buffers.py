"""What two ranks send each other for a group norm and the convolution behind it: moments and rows in one message.

Shapes: B batch, C channels, W columns, G groups.
"""

from __future__ import annotations

import torch


class MomentsAndRows:
    """Moments and rows in one buffer of bytes.

    Args:
        moments: float32 [2, B, G]; a multiple of 8 bytes, so rows of any dtype can be viewed behind them.
        rows: [B, C, rows, W] of the map's dtype.
    """

    def __init__(self, moments: torch.Tensor, rows: torch.Tensor) -> None:
        self.bytes = torch.empty(moments.nbytes + rows.nbytes, dtype=torch.uint8, device=rows.device)
        self.moments = self.bytes[: moments.nbytes].view(moments.dtype).view(moments.shape)
        self.rows = self.bytes[moments.nbytes :].view(rows.dtype).view(rows.shape)


class SwapBuffers:
    """What one of two ranks sends for a pair of layers, and what it receives.

    Args:
        moments: float32 [2, B, G].
        outgoing, incoming: rows, [B, C, rows, W].
        halo_key: of the layer whose rows they are.
    """

    def __init__(
        self, moments: torch.Tensor, outgoing: torch.Tensor, incoming: torch.Tensor, halo_key: tuple[object, ...]
    ) -> None:
        self.sent, self.received = MomentsAndRows(moments, outgoing), MomentsAndRows(moments, incoming)
        self.halo_key = halo_key

    @property
    def nbytes(self) -> int:
        return self.sent.bytes.nbytes + self.received.bytes.nbytes
