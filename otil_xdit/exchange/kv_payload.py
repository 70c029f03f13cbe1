"""The payload of a group of layers: where each part lies in its bytes, how it is written and how it is read.

Shapes: l layers of a run; N patches, B batch, S tokens of one patch, C features, K sub-blocks of T tokens, k sent a
step, m = k * T tokens, V = 2 * B * m vectors of a layer's payload.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from otil_xdit.method.adaptive_codec import sizes_of
from otil_xdit.method.codec import Decoded
from otil_xdit.method.codecs import make_codec
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.scratch import ScratchBuffers
from otil_xdit.method.selection import blocks_to_send

_ALIGNMENT = 16
"""Bytes; each layer's payload, and what a codec writes in it, starts at a multiple of it, to be viewed in any dtype."""


@dataclass(frozen=True)
class PayloadLayout:
    """What lies where in one layer's payload: [gains, error, indices, padding, coded tokens, padding], in bytes.

    Attributes:
        gains, error, indices: where each ends.
        coded: where the coded tokens start.
        size: bytes in all.
        count: sub-blocks sent, k; 0 where everything is.
        vectors: V.
    """

    gains: int
    error: int
    indices: int
    coded: int
    size: int
    count: int
    vectors: int

    @property
    def has_gains(self) -> bool:
        return self.gains > 0

    @property
    def has_error(self) -> bool:
        return self.error > self.gains

    @classmethod
    def of(cls, shape: torch.Size, dtype: torch.dtype, table: torch.Tensor, config: OtilConfig) -> PayloadLayout:
        """Return the layout for keys and values of `shape`, [2, B, S, C], and sub-blocks of `table`, [K, T]."""
        _, batch, tokens, width = shape
        blocks, block_tokens = table.shape
        count = 0 if config.ratio >= 1 else blocks_to_send(blocks, config.ratio)
        vectors = 2 * batch * (count * block_tokens or tokens)
        gains = 8 if config.extrapolation == "fitted" else 0
        error = gains + (4 if config.tolerance else 0)
        indices = error + 4 * count
        coded = _aligned(indices)
        size = _aligned(coded + make_codec(config.codec, dtype).size(vectors, width))
        return cls(gains, error, indices, coded, size, count, vectors)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Unpacked:
    """The payloads of a run of layers from all ranks.

    Attributes:
        gains: every sender's, float32 [l, N, 2, 2], of tokens that were sent and of others; None where they do not
            travel.
        errors: of every sender's prediction, float32 [l, N]; None where they do not travel.
        rows: int64 [l * N * 2 * B * m], where each sent token goes of the l * N * 2 * B * S; None where all are sent.
        sent: float32 [l, N, S], 1 where a token was sent and 0 elsewhere; None where all are.
        numbers, scales: residuals, [l, N, 2, B, S, C] and [l, N, 2, B, S, 1], 0 where none came; or values,
            [l, N, 2, B, m, C]. The scales are None where the numbers are whole.
    """

    gains: torch.Tensor | None
    errors: torch.Tensor | None
    rows: torch.Tensor | None
    sent: torch.Tensor | None
    numbers: torch.Tensor
    scales: torch.Tensor | None


class PayloadCodec:
    """Writes and reads the payloads of layers of equal shape.

    Args:
        shape, dtype: of one rank's keys and values of one layer, [2, B, S, C].
        table: int64 [K, T], the tokens of each sub-block, on the layers' device.
        config: the settings.
        scratch: for intermediate tensors.
    """

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, table: torch.Tensor, config: OtilConfig, scratch: ScratchBuffers
    ) -> None:
        self.layout = PayloadLayout.of(shape, dtype, table, config)
        self._codec = make_codec(config.codec, dtype)
        self._shape, self._table, self._scratch = shape, table, scratch
        self._first_rows = torch.empty(0, dtype=torch.int64, device=table.device)

    @property
    def of_residuals(self) -> bool:
        """Tell whether residuals are sent, or the values themselves."""
        return self._codec.of_residuals

    @property
    def by_feature(self) -> bool:
        """Tell whether features are coded by their `sizes`."""
        return self._codec.by_feature

    def sizes(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the root mean square of each feature of [l, 2, B, S, C], float32 [l, 2, C]."""
        return sizes_of(numbers, (2, 3), self._scratch)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device."""
        return self._first_rows.nbytes

    def allocate(self, layers: int, ranks: int) -> None:
        """Make what `unpack` needs for so many layers."""
        rows = layers * ranks * 2 * self._shape[1]
        self._first_rows = torch.arange(rows, device=self._table.device) * self._shape[2]

    def pack_gains(self, payload: torch.Tensor, gains: torch.Tensor, fitted: torch.Tensor) -> None:
        """Write gains to payloads, uint8 [l, size], where they travel.

        Args:
            payload: uint8 [l, size].
            gains: that the residuals of tokens were found with, float32 [l, 2], rounded to float16.
            fitted: of tokens that are not sent, float32 [l, 2].
        """
        if self.layout.has_gains:
            written = payload[:, : self.layout.gains].view(torch.float16)
            written[:, :2].copy_(gains)
            written[:, 2:].copy_(fitted)

    def pack_error(self, payload: torch.Tensor, fresh: torch.Tensor, residual: torch.Tensor) -> None:
        """Write the prediction's relative error |residual| / |fresh|; both are [l, 2, B, S, C]."""
        layout = self.layout
        missed = torch.linalg.vector_norm(residual.flatten(1), dim=1)
        error = missed / torch.linalg.vector_norm(fresh.float().flatten(1), dim=1).clamp_min(1e-15)
        payload[:, layout.gains : layout.error].view(torch.float32).copy_(error[:, None])

    def pack_selected(self, payload: torch.Tensor, selected: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Write the numbers of the selected sub-blocks, and return their tokens.

        Args:
            payload: uint8 [l, size].
            selected: int64 [l, k].
            values: residuals or fresh values, [l, 2, B, S, C].

        Returns:
            [l * V, C], in scratch.
        """
        layout = self.layout
        payload[:, layout.error : layout.indices].view(torch.int32).copy_(selected)
        rows, width = self._rows(self._tokens(selected)), self._shape[-1]
        taken = self._scratch("taken", (rows.numel(), width), values.dtype)
        return torch.index_select(values.view(-1, width), 0, rows, out=taken)

    def pack_tokens(self, payload: torch.Tensor, tokens: torch.Tensor, sizes: torch.Tensor | None) -> None:
        """Code tokens, l * V vectors of C numbers, into payloads, uint8 [l, size]; `sizes` where `by_feature`."""
        vectors = tokens.reshape(len(payload), self.layout.vectors, self._shape[-1])
        if sizes is None:
            self._codec.encode(vectors, payload[:, self._coded], self._scratch)
        else:
            self._codec.encode_measured(vectors, sizes, payload[:, self._coded], self._scratch)

    def unpack(self, received: torch.Tensor) -> Unpacked:
        """Read everybody's payloads, uint8 [l, N, size]."""
        layout, gains, errors, rows, sent = self.layout, None, None, None, None
        if layout.has_gains:
            gains = received[..., : layout.gains].view(torch.float16).float().unflatten(-1, (2, 2))
        if layout.has_error:
            errors = received[..., layout.gains : layout.error].view(torch.float32).squeeze(-1)
        if layout.count:
            tokens = self._tokens(received[..., layout.error : layout.indices].view(torch.int32))
            rows = self._rows(tokens)
            sent = self._scratch("sent", (*received.shape[:2], self._shape[2]), torch.float32).zero_()
            sent.scatter_(2, tokens, 1.0)
        return Unpacked(gains, errors, rows, sent, *self._decoded(received[..., self._coded], rows))

    @property
    def _coded(self) -> slice:
        """Bytes of a payload that hold the coded tokens."""
        layout = self.layout
        return slice(layout.coded, layout.coded + self._codec.size(layout.vectors, self._shape[-1]))

    def _tokens(self, selected: torch.Tensor) -> torch.Tensor:
        """Return the tokens of sub-blocks, integers [..., k], as int64 [..., m], in scratch."""
        found = self._scratch("tokens", (selected.numel(), self._table.shape[1]), torch.int64)
        torch.index_select(self._table, 0, selected.reshape(-1), out=found)
        return found.view(*selected.shape[:-1], -1)

    def _rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the places of tokens, int64 [..., m], among the rows of [..., 2, B, S], int64 [... * 2 * B * m]."""
        many = tokens.shape[:-1].numel() * 2 * self._shape[1]
        rows = self._scratch("rows", (many, tokens.shape[-1]), torch.int64)
        rows = rows.view(*tokens.shape[:-1], -1, tokens.shape[-1])
        torch.add(tokens[..., None, :], self._first_rows[:many].view(*rows.shape[:-1], 1), out=rows)
        return rows.view(-1)

    def _decoded(self, coded: torch.Tensor, rows: torch.Tensor | None) -> Decoded:
        """Decode uint8 [l, N, size]; see `Unpacked` for what comes back."""
        codec, vectors, (_, batch, tokens, width) = self._codec, self.layout.vectors, self._shape
        if rows is None or not codec.of_residuals:
            decoded = codec.decode(coded, vectors, width, self._scratch)
        else:
            decoded = codec.decode_at(coded, vectors, width, rows, 2 * batch * tokens, self._scratch)
        numbers, scales = (None if part is None else part.unflatten(2, (2, batch, -1)) for part in decoded)
        assert numbers is not None, "a codec returns numbers"
        return numbers, scales
