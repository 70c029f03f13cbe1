"""Keys and values of one attention layer across the patches: what a rank keeps, sends and gets.

Shapes: N patches, B batch, H heads, S tokens of one patch, D head dimension, K sub-blocks of T tokens, k sent a step.
"""

from __future__ import annotations

import torch

from otil_xdit.exchange import Exchange, ExchangedLayer
from otil_xdit.schedule import Mode
from otil_xdit.selection import blocks_to_send

_ALIGNMENT = 16
"""Bytes; the values start at a multiple of it behind the indices, so that both can be viewed in their own dtype."""


class KVLayer(ExchangedLayer[torch.Tensor]):
    """The copy of every patch's keys and values that one rank attends to, for one attention layer.

    The buffer is allocated once and lives as long as shapes and dtype stay the same; the first steps of a generation
    are synchronous and overwrite it whole, so nothing of an earlier image is left.

    Args:
        exchange: carries the payloads.
        name: the layer's name in error messages.
        like: this rank's keys, [B, H, S, D]; gives shape, dtype and device.
        table: int64 [K, T], the tokens of each sub-block.
        ratio: share of the K sub-blocks to send in a displaced step.
    """

    def __init__(self, exchange: Exchange, name: str, like: torch.Tensor, table: torch.Tensor, ratio: float) -> None:
        super().__init__()
        batch, heads, tokens, head_dim = like.shape
        ranks = exchange.group.world_size
        self.shape, self.dtype = like.shape, like.dtype
        self.table = table
        self._exchange, self._name = exchange, name
        self._own = slice(exchange.group.rank * tokens, (exchange.group.rank + 1) * tokens)
        self._first_token = torch.arange(ranks, device=like.device)[:, None] * tokens
        self._buffer = like.new_empty(2, batch, heads, ranks * tokens, head_dim)
        blocks, block_tokens = table.shape
        self.sends_all = ratio >= 1
        self._count = blocks if self.sends_all else blocks_to_send(blocks, ratio)
        sent_tokens = tokens if self.sends_all else self._count * block_tokens
        self._values_shape = (2, batch, heads, sent_tokens, head_dim)
        # A payload is [indices, padding, values] in bytes: one collective carries both.
        self._index_bytes = 0 if self.sends_all else 4 * self._count
        self._values_start = -(-self._index_bytes // _ALIGNMENT) * _ALIGNMENT
        size = self._values_start + 2 * batch * heads * sent_tokens * head_dim * like.element_size()
        self._payload = torch.zeros(size, dtype=torch.uint8, device=like.device)
        self._received = self._payload.new_empty(ranks, size)

    @property
    def previous(self) -> torch.Tensor:
        """This rank's own keys and values of the step before, [2, B, H, S, D]; valid until `gather`."""
        return self._buffer[:, :, :, self._own]

    @property
    def nbytes(self) -> int:
        """Bytes that this layer keeps on its device."""
        return self._buffer.nbytes + self._payload.nbytes + self._received.nbytes

    def gather(
        self,
        fresh: torch.Tensor,
        mode: Mode,
        picked: torch.Tensor | None,
        workspace: torch.Tensor,
        step: int,
        kind: str,
    ) -> torch.Tensor:
        """Every patch's keys and values, as far as `mode` lets this rank know them.

        Args:
            fresh: this rank's keys and values of this step, [2, B, H, S, D], contiguous.
            mode: ``sync`` waits for everybody's of this step; ``displaced`` takes those that were sent a step
                earlier and sends the picked sub-blocks of this one; ``frozen`` keeps what there is.
            picked: int64 [k], sub-blocks to send; None sends all. Read in displaced mode only.
            workspace: [N, 2, B, H, S, D], overwritten in sync mode; layers may share it.
            step: for error messages.
            kind: the counter that the bytes go to.

        Returns:
            [2, B, H, N * S, D], this layer's buffer: read it before the next call. This rank's part is fresh.
        """
        where = f"layer {self._name} at step {step}"
        self._receive()
        if mode == "sync":
            gathered = self._exchange.all_gather(fresh, workspace, kind, where).wait()
            self._buffer.unflatten(3, (-1, self.shape[2])).copy_(gathered.permute(1, 2, 3, 0, 4, 5))
        else:
            self._buffer[:, :, :, self._own] = fresh
        if mode == "displaced":
            self._send(fresh, picked, kind, where)
        self.visits += 1
        return self._buffer

    def _send(self, fresh: torch.Tensor, picked: torch.Tensor | None, kind: str, where: str) -> None:
        values = self._values(self._payload)
        if picked is None:
            values.copy_(fresh)
        else:
            self._indices(self._payload).copy_(picked)
            torch.index_select(fresh, 3, self.table[picked].flatten(), out=values)
        self._pending = self._exchange.all_gather(self._payload, self._received, kind, where)

    def _receive(self) -> None:
        """Put what the others sent a step ago where it belongs; this rank's own part is overwritten right after."""
        received = self.drain()
        if received is None:
            return
        values = self._values(received)
        if self.sends_all:
            self._buffer.unflatten(3, (-1, self.shape[2])).copy_(values.permute(1, 2, 3, 0, 4, 5))
            return
        tokens = self.table[self._indices(received).long()].flatten(1) + self._first_token
        self._buffer.index_copy_(3, tokens.flatten(), values.permute(1, 2, 3, 0, 4, 5).flatten(3, 4))

    def _indices(self, payload: torch.Tensor) -> torch.Tensor:
        """The indices in a payload ([size] or [N, size] bytes), int32 [..., k]."""
        return payload[..., : self._index_bytes].view(torch.int32)

    def _values(self, payload: torch.Tensor) -> torch.Tensor:
        """The keys and values in a payload ([size] or [N, size] bytes), [..., 2, B, H, tokens, D]."""
        return payload[..., self._values_start :].view(self.dtype).unflatten(-1, self._values_shape)
