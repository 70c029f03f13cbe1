"""Keys and values across the patches: what a rank keeps, sends and gets, for attention layers of equal shape.

Shapes: L layers, l of them in a run; N patches, B batch, S tokens of one patch, C features (heads x head dimension), K
sub-blocks of T tokens, k sent a step, m = k * T tokens, V = 2 * B * m vectors of a layer's payload.
"""

from __future__ import annotations

import torch

from otil_xdit.comm.collectives import Collectives, Pending
from otil_xdit.exchange.kv_payload import PayloadLayout
from otil_xdit.method.codec import Codec, Decoded, make_codec
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.predictor import Predictor, storage_dtypes
from otil_xdit.method.schedule import Mode
from otil_xdit.method.scratch import ScratchBuffers
from otil_xdit.method.selection import BlockSelector

_MOST_LAYERS, _MOST_VALUES = 4, 2**23
"""Bounds of a stack: that many layers, and that many values of one rank (but one layer at least). Layers that travel
together leave with the last of them and are waited for by the first: a stack of a quarter of a network's layers has
three quarters of a step to travel, one of all of them has nothing. And what is computed of all at once takes room.

Besides, a message is never larger than one layer's slice as it is: payloads that are not coded leave layer by layer.
Small ones save latencies and operations by travelling together; large ones would leave the link idle while they wait
for their last layer, and the next step waiting for all of them when it wants the first."""


class KVGroup:
    """Attention layers of equal shape that are called one after the other: their copies, payloads and messages.

    Layers join while they are called for the first time. What is sent of them without waiting leaves in one message
    when the last of them has been called, and is coded and decoded for all of them at once.

    Buffers live as long as shapes and dtype stay the same; a generation's first steps are synchronous and overwrite
    them whole, so nothing of an earlier image is left.

    Args:
        exchange: carries the payloads.
        shape, dtype: of one rank's keys and values of one layer, [2, B, S, C].
        table: int64 [K, T], the tokens of each sub-block, on the layers' device.
        config: the settings.
        picker: says what to send.
        room: for what is needed for a moment only, and for results.
    """

    def __init__(
        self,
        collectives: Collectives,
        shape: torch.Size,
        dtype: torch.dtype,
        table: torch.Tensor,
        config: OtilConfig,
        picker: BlockSelector,
        scratch: ScratchBuffers,
    ) -> None:
        self.shape, self.dtype, self.table = shape, dtype, table
        self.num_calls: list[int] = []
        self.names: list[str] = []
        self._collectives, self._config, self._picker, self._scratch = collectives, config, picker, scratch
        self._rank, self._ranks = collectives.group.rank, collectives.group.world_size
        self._warmup_codec = make_codec(config.warmup_codec, dtype)
        self._codec = make_codec(config.codec, dtype)
        self._layout = PayloadLayout.of(shape, dtype, table, config)
        self._first: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._predictor: Predictor | None = None
        self._previous: torch.Tensor | None = None
        self._errors: torch.Tensor | None = None
        self._picked: torch.Tensor | None = None
        self._unsent: list[int] = []
        self._unsent_at = ("", "")
        self._pending: list[tuple[slice, Pending[torch.Tensor]]] = []

    # ---- layers and buffers ----------------------------------------------------------------------------------------

    def fits(self, shape: torch.Size, dtype: torch.dtype, table: torch.Tensor) -> bool:
        """Whether a layer of these may join now."""
        same = self.shape == shape and self.dtype == dtype and self.table is table
        layers, values = len(self.names) + 1, self.shape.numel()
        small = layers <= _MOST_LAYERS and layers * values <= _MOST_VALUES
        light = layers * self._layout.size <= values * self.dtype.itemsize
        return same and small and light and not self._is_sealed

    def join(self, name: str) -> int:
        """A new layer's place."""
        self.names.append(name)
        self.num_calls.append(0)
        return len(self.names) - 1

    def seal(self) -> None:
        """No layer joins any more: make the buffers of those that have."""
        if self._is_sealed or self._config.freshness == "sync":
            return
        layers, device, layout = len(self.names), self.table.device, self._layout
        like = torch.empty((), dtype=self.dtype, device=device).expand(layers, *self.shape)
        self._predictor = Predictor(like, self._ranks, self._rank, self._config, self._scratch)
        if self._keeps_previous:
            self._previous = torch.zeros_like(like, memory_format=torch.contiguous_format)
        for layer, (values, fresh) in self._first.items():
            self._predictor.set_values(layer, values)
            if self._previous is not None and fresh is not None:
                self._previous[layer] = fresh
        self._first.clear()
        self._gains = torch.zeros(layers, 2, device=device)
        self._payload = torch.zeros(layers, layout.size, dtype=torch.uint8, device=device)
        self._received = torch.zeros(layers * self._ranks * layout.size, dtype=torch.uint8, device=device)
        rows = layers * self._ranks * 2 * self.shape[1]
        self._first_rows = torch.arange(rows, device=device) * self.shape[2]

    @property
    def _is_sealed(self) -> bool:
        return self._predictor is not None

    @property
    def _keeps_previous(self) -> bool:
        """Whether what a layer was called with last is what its next sub-blocks are compared with."""
        return (
            self._layout.count > 0
            and self._config.score_reference == "previous"
            and self._config.select.startswith("kv")
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the layers keep on their device."""
        if self._predictor is None:
            return sum(kept.nbytes for first in self._first.values() for kept in first if kept is not None)
        buffers = (self._payload, self._received, self._first_rows, self._gains)
        previous = 0 if self._previous is None else self._previous.nbytes
        return sum(tensor.nbytes for tensor in (*self._predictor.tensors, *buffers)) + previous

    def shared_state(self, layer: int) -> list[torch.Tensor]:
        """What of a layer must be the same on all ranks between two steps, bit for bit."""
        return [] if self._predictor is None else [tensor[layer] for tensor in self._predictor.tensors]

    def error(self, layer: int) -> float:
        """The largest prediction error of any rank that is known so far, relative to its values: |fresh - p| / |fresh|.

        Only with a tolerance; waits for the device.
        """
        return float("inf") if self._errors is None else float(self._errors[layer].max())

    # ---- a generation ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a generation."""
        self.drain()
        self.seal()
        self.num_calls = [0] * len(self.num_calls)
        self._errors = None
        if self._predictor is not None:
            self._predictor.reset()

    def drain(self) -> None:
        """Wait for what is under way, and forget it and what was not sent yet."""
        pending, self._pending = self._pending, []
        self._unsent.clear()
        for _, message in pending:
            message.wait()

    def absorb(self) -> None:
        """Take in what the others sent a step ago, if anything is under way."""
        pending, self._pending = self._pending, []
        for run, message in pending:
            self._update(run, message.wait())

    def flush(self) -> None:
        """Send what waits for the rest of the stack's layers to be called."""
        layers, self._unsent = sorted(self._unsent), []
        for first in [layer for layer in layers if layer - 1 not in layers]:
            last = next(layer for layer in layers if layer >= first and layer + 1 not in layers)
            self._write(slice(first, last + 1))
            self._send(slice(first, last + 1), *self._unsent_at)

    def gather(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, mode: Mode, step: int, kind: str
    ) -> torch.Tensor:
        """Every patch's keys and values, as far as `mode` lets this rank know them.

        Args:
            layer: its place.
            key, value: this rank's of this step, [B, H, S, D] with H * D = C.
            mode: ``sync`` waits for everybody's of this step, exact but for the warm-up's codec; ``fresh`` waits for
                what is sent of them; ``displaced`` takes what was sent until the step before, predicted to this one,
                and sends for the next; ``frozen`` keeps what there is.
            step: for error messages.
            kind: the counter that the bytes go to.

        Returns:
            [2, B, N * S, C] in a room: read it before the next call of any layer. This rank's part is fresh.
        """
        where = f"step {step}"
        if self._unsent and (layer in self._unsent or self._unsent_at != (where, kind)):
            self.flush()
        self.absorb()
        fresh = self._scratch("fresh", (len(self.names), *self.shape), self.dtype)[layer]
        for own, given in zip(fresh, (key, value), strict=True):
            own.unflatten(2, (key.shape[1], -1)).copy_(given.transpose(1, 2))
        whole = self._scratch("whole", (2, self.shape[1], self._ranks, *self.shape[2:]), self.dtype)
        by_rank = whole.permute(2, 0, 1, 3, 4)
        if mode == "sync":
            self._gather_all(layer, fresh, by_rank, kind, where)
        else:
            self._gather_some(layer, fresh, mode, by_rank, kind, where)
        by_rank[self._rank] = fresh
        self.num_calls[layer] += 1
        return whole.flatten(2, 3)

    def _gather_all(self, layer: int, fresh: torch.Tensor, out: torch.Tensor, kind: str, where: str) -> None:
        """Everybody's values, to `out`, [N, 2, B, S, C]."""
        codec, ranks = self._warmup_codec, self._ranks
        # A refresh is exact, whatever the warm-up sends.
        warmed_up = self.num_calls[layer] >= self._config.warmup_steps
        if codec.lossless or self._config.freshness == "sync" or warmed_up:
            values = self._scratch("gathered", (ranks, *self.shape), self.dtype)
            self._collectives.all_gather(fresh, values, kind, self._where(slice(layer, layer + 1), where)).wait()
        else:
            values = self._gather_changes(layer, fresh, codec, kind, where)
        if self._predictor is not None:
            self._predictor.set_values(layer, values)
        elif self._config.freshness != "sync":
            kept = values.to(storage_dtypes(self._config.kv_cache_dtype, self.dtype)[0], copy=True)
            self._first[layer] = kept, fresh.clone() if self._keeps_previous else None
        if self._previous is not None:
            self._previous[layer] = fresh
        out.copy_(values)

    def _gather_changes(self, layer: int, fresh: torch.Tensor, codec: Codec, kind: str, where: str) -> torch.Tensor:
        """Everybody's values, float32 [N, 2, B, S, C], as far as coded changes since the step before tell them."""
        ranks, width = self._ranks, self.shape[-1]
        vectors = self.shape.numel() // width
        shape = (ranks, *self.shape)
        if self._predictor is None or not codec.of_residuals:
            known = self._scratch("known", shape, torch.float32).zero_()
        else:
            known = self._predictor.last_values(layer)
        changes = self._scratch("residual", tuple(self.shape), torch.float32).copy_(fresh).sub_(known[self._rank])
        payload = self._scratch("payload", (codec.size(vectors, width),), torch.uint8)
        received = self._scratch("received", (ranks, payload.numel()), torch.uint8)
        codec.encode(changes.view(vectors, width), payload, self._scratch)
        where = self._where(slice(layer, layer + 1), where)
        coded = self._collectives.all_gather(payload, received, kind, where).wait()
        numbers, scales = codec.decode(coded, vectors, width, self._scratch)
        if scales is None:
            return known.add_(numbers.reshape(shape))
        return known.addcmul_(numbers.reshape(shape), scales.view(*shape[:-1], 1))

    def _gather_some(
        self, layer: int, fresh: torch.Tensor, mode: Mode, out: torch.Tensor, kind: str, where: str
    ) -> None:
        predictor = self._predictor
        assert predictor is not None, "the first step is synchronous, and the stack sealed after it"
        gain = predictor.gain(layer, fresh)
        if self._layout.count and mode != "frozen":
            self._picked = self._picker.select_shared(self.table, self.shape[2])
        if mode == "fresh":
            self.flush()
            alone = slice(layer, layer + 1)
            self._gains[layer] = gain
            self._write(alone)
            self._send(alone, where, kind)
            self.absorb()
            out.copy_(predictor.value[layer])
            return
        predictor.predict(layer, gain, out)
        if mode == "displaced":
            self._gains[layer] = gain
            self._unsent.append(layer)
            self._unsent_at = (where, kind)
            # Not all of the stack's layers: those of another pass may not be called in this generation.
            if len(self._unsent) == sum(num_calls > 0 for num_calls in self.num_calls):
                self.flush()

    # ---- payloads --------------------------------------------------------------------------------------------------

    def _send(self, run: slice, where: str, kind: str) -> None:
        first, last, size = run.start, run.stop, self._ranks * self._layout.size
        received = self._received[first * size : last * size].view(self._ranks, last - first, self._layout.size)
        pending = self._collectives.all_gather(self._payload[run], received, kind, self._where(run, where))
        self._pending.append((run, pending))

    def _where(self, run: slice, where: str) -> str:
        first, last = self.names[run.start], self.names[run.stop - 1]
        return f"layer {first} at {where}" if first == last else f"layers {first} to {last} at {where}"

    def _write(self, run: slice) -> None:
        """Fill the payloads of a run of layers from what they were called with."""
        predictor, layout, payload = self._predictor, self._layout, self._payload[run]
        assert predictor is not None, "see `_gather_some`"
        fresh = self._scratch("fresh", (len(self.names), *self.shape), self.dtype)[run]
        gains = self._gains[run]
        if layout.gains:
            payload[:, : layout.gains].view(torch.float32).copy_(gains)
        tokens, own, residual = fresh, fresh, None
        if self._codec.of_residuals or layout.error > layout.gains or (layout.count and self._previous is None):
            own = self._scratch("own", tuple(fresh.shape), torch.float32)
            predictor.predict_own(run, gains, own)
            residual = self._scratch("residual", tuple(fresh.shape), torch.float32).copy_(fresh).sub_(own)
            tokens = residual if self._codec.of_residuals else fresh
        if layout.error > layout.gains and residual is not None:
            missed = torch.linalg.vector_norm(residual.flatten(1), dim=1)
            error = missed / torch.linalg.vector_norm(fresh.float().flatten(1), dim=1).clamp_min(1e-15)
            payload[:, layout.gains : layout.error].view(torch.float32).copy_(error[:, None])
        if layout.count:
            reference, difference = (own, residual) if self._previous is None else (self._previous[run], None)
            if self._picked is None:
                layers = self.names[0], len(self.names)
                picked = self._picker.select(layers, self.table, fresh, reference, difference, run)
            else:
                picked = self._picked.expand(len(fresh), -1)
            payload[:, layout.error : layout.indices].view(torch.int32).copy_(picked)
            tokens = self._taken(tokens, self._tokens(picked))
        if self._previous is not None:
            self._previous[run] = fresh
        vectors = tokens.reshape(len(payload), layout.vectors, self.shape[-1])
        end = layout.coded + self._codec.size(layout.vectors, self.shape[-1])
        self._codec.encode(vectors, payload[:, layout.coded : end], self._scratch)

    def _tokens(self, picked: torch.Tensor) -> torch.Tensor:
        """The tokens of sub-blocks, integers [..., k]: int64 [..., m], in a room."""
        found = self._scratch("tokens", (picked.numel(), self.table.shape[1]), torch.int64)
        torch.index_select(self.table, 0, picked.reshape(-1), out=found)
        return found.view(*picked.shape[:-1], -1)

    def _rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Places of tokens, int64 [..., m], among the rows of [..., 2, B, S]: int64 [... * 2 * B * m], in a room."""
        many = tokens.shape[:-1].numel() * 2 * self.shape[1]
        rows = self._scratch("rows", (many, tokens.shape[-1]), torch.int64).view(
            *tokens.shape[:-1], -1, tokens.shape[-1]
        )
        torch.add(tokens[..., None, :], self._first_rows[:many].view(*rows.shape[:-1], 1), out=rows)
        return rows.view(-1)

    def _taken(self, values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Of values, [l, 2, B, S, C], those of tokens, int64 [l, m]: [l * V, C], in a room."""
        rows, width = self._rows(tokens), self.shape[-1]
        taken = self._scratch("taken", (rows.numel(), width), values.dtype)
        return torch.index_select(values.view(-1, width), 0, rows, out=taken)

    def _update(self, run: slice, received: torch.Tensor) -> None:
        """Carry the copies of a run of layers a step forward with everybody's payloads, uint8 [N, l, size]."""
        assert self._predictor is not None, "see `_gather_some`"
        layout, received = self._layout, received.transpose(0, 1)
        constant = self._config.extrapolation_gain if self._config.extrapolation == "constant" else 0.0
        gains = torch.full((*received.shape[:2], 2), constant, device=received.device)
        if layout.gains:
            gains = received[..., : layout.gains].view(torch.float32)
        if layout.error > layout.gains:
            if self._errors is None:
                self._errors = torch.full((len(self.names), self._ranks), float("inf"), device=received.device)
            self._errors[run] = received[..., layout.gains : layout.error].view(torch.float32).squeeze(-1)
        rows = sent = None
        if layout.count:
            tokens = self._tokens(received[..., layout.error : layout.indices].view(torch.int32))
            rows = self._rows(tokens)
            sent = self._scratch("sent", (*received.shape[:2], self.shape[2]), torch.float32).zero_()
            sent.scatter_(2, tokens, 1.0)
        end = layout.coded + self._codec.size(layout.vectors, self.shape[-1])
        coded = received[..., layout.coded : end]
        numbers, scales = self._decoded(coded, rows)
        if self._codec.of_residuals:
            self._predictor.apply_residuals(run, gains, numbers, scales, sent)
        else:
            values = numbers if scales is None else numbers * scales
            self._predictor.apply_values(run, gains, values, rows, sent)

    def _decoded(self, coded: torch.Tensor, rows: torch.Tensor | None) -> Decoded:
        """Decode uint8 [l, N, size]: values [l, N, 2, B, m, C], or residuals [l, N, 2, B, S, C], 0 where none came."""
        codec, vectors, (_, batch, tokens, width) = self._codec, self._layout.vectors, self.shape
        if rows is None or not codec.of_residuals:
            decoded = codec.decode(coded, vectors, width, self._scratch)
        else:
            decoded = codec.decode_at(coded, vectors, width, rows, 2 * batch * tokens, self._scratch)
        numbers, scales = (None if part is None else part.unflatten(2, (2, batch, -1)) for part in decoded)
        assert numbers is not None, "a codec returns numbers"
        return numbers, scales
