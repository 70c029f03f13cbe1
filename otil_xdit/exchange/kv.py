"""Keys and values across the patches: what a rank keeps, sends and gets at a step, by mode.

Over 300 lines: a group's policy, its messages and its copies change together at every step, and splitting them would
make three objects that read each other's state. What needs none of it stands in kv_payload.py and kv_groups.py.

Shapes: L layers, l of them in a run; N patches, B batch, S tokens of one patch, C features (heads x head dimension), K
sub-blocks of T tokens, k sent a step, m = k * T tokens, V = 2 * B * m vectors of a layer's payload.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from otil_xdit.comm.collectives import CollectiveLabel, Collectives, Pending, Phase
from otil_xdit.exchange.kv_payload import PayloadCodec
from otil_xdit.method.codec import Codec
from otil_xdit.method.codecs import make_codec
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.coordinates import Coordinates
from otil_xdit.method.predictor import Predictor, storage_dtypes
from otil_xdit.method.schedule import Mode
from otil_xdit.method.scratch import ScratchBuffers
from otil_xdit.method.selection import BlockSelector

MOST_LAYERS, MOST_VALUES = 4, 2**23
"""Bounds of a group: that many layers, and that many values of one rank (but one layer at least). Layers that travel
together leave with the last of them and are waited for by the first: a group of a quarter of a network's layers has
three quarters of a step to travel, one of all of them has nothing. And what is computed of all at once takes memory,
unless kernels compute it in one pass: then the number of layers is the only bound.

Besides, a message is never larger than one layer's slice as it is: payloads that are not coded leave layer by layer.
Small ones save latencies and operations by travelling together; large ones would leave the link idle while they wait
for their last layer, and the next step waiting for all of them when it wants the first."""


class KVGroup:
    """Attention layers of equal shape that are called one after the other: their copies, payloads and messages.

    Over 200 lines, for the reason at the top of this file.

    Layers join while they are called for the first time. What is sent of them without waiting leaves in one message
    when the last of them has been called, and is coded and decoded for all of them at once.

    Buffers live as long as shapes and dtype stay the same; a generation's first steps are synchronous and overwrite
    them whole, so nothing of an earlier image is left.

    Args:
        collectives: carry the payloads.
        shape, dtype: of one rank's keys and values of one layer, [2, B, S, C].
        table: int64 [K, T], the tokens of each sub-block, on the layers' device.
        config: the settings.
        selector: says what to send.
        scratch: for intermediate tensors and for results.
    """

    def __init__(
        self,
        collectives: Collectives,
        shape: torch.Size,
        dtype: torch.dtype,
        table: torch.Tensor,
        config: OtilConfig,
        selector: BlockSelector,
        scratch: ScratchBuffers,
    ) -> None:
        self.shape, self.dtype, self.table = shape, dtype, table
        self.num_calls: list[int] = []
        self.names: list[str] = []
        self._coordinates: list[tuple[Coordinates, bool]] = []
        self._collectives, self._config, self._selector, self._scratch = collectives, config, selector, scratch
        self._rank, self._ranks = collectives.group.rank, collectives.group.world_size
        self._warmup_codec = make_codec(config.warmup_codec, dtype)
        self._payload_codec = PayloadCodec(shape, dtype, table, config, scratch)
        self._layout = self._payload_codec.layout
        self._first: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._predictor: Predictor | None = None
        self._previous: torch.Tensor | None = None
        self._errors: torch.Tensor | None = None
        self._selected: torch.Tensor | None = None
        self._unsent: list[int] = []
        self._unsent_label = CollectiveLabel("kv", "", None)
        self._pending: list[tuple[slice, Pending[torch.Tensor]]] = []

    # ---- layers and buffers ----------------------------------------------------------------------------------------

    def fits(self, shape: torch.Size, dtype: torch.dtype, table: torch.Tensor) -> bool:
        """Tell whether a layer of these may join now."""
        same = self.shape == shape and self.dtype == dtype and self.table is table
        layers, values = len(self.names) + 1, self.shape.numel()
        one_pass = self._payload_codec.can_fuse(table) and self._config.kv_cache_dtype != "float8"
        small = layers <= MOST_LAYERS and (one_pass or layers * values <= MOST_VALUES)
        light = layers * self._layout.size <= values * self.dtype.itemsize
        return same and small and light and not self._is_allocated

    def join(self, name: str, coordinates: tuple[Coordinates, bool] | None = None) -> int:
        """Add a layer, and return its place.

        Args:
            coordinates: the layer's, and whether they follow from its first keys and values; None for all layers, or
                for none.
        """
        self.names.append(name)
        self.num_calls.append(0)
        if coordinates is not None:
            self._coordinates.append(coordinates)
        return len(self.names) - 1

    def allocate(self) -> None:
        """Make the buffers of the layers that have joined; no other joins any more."""
        if self._is_allocated or self._config.freshness == "sync":
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
        self._payload_codec.allocate(layers, self._ranks)

    @property
    def _is_allocated(self) -> bool:
        return self._predictor is not None

    @property
    def _keeps_previous(self) -> bool:
        """Tell whether a layer's next sub-blocks are compared with what it was called with last."""
        return (
            self._layout.count > 0
            and self._config.score_reference == "previous"
            and self._config.select.startswith("kv")
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the layers keep on their device."""
        coordinates = sum(kept.nbytes for kept, _ in self._coordinates)
        if self._predictor is None:
            first = [kept for first in self._first.values() for kept in first if kept is not None]
            return coordinates + sum(kept.nbytes for kept in first)
        buffers = (self._payload, self._received, self._gains, *self._predictor.tensors)
        previous = 0 if self._previous is None else self._previous.nbytes
        return sum(tensor.nbytes for tensor in buffers) + self._payload_codec.nbytes + previous + coordinates

    def shared_state(self, layer: int) -> list[torch.Tensor]:
        """Return what of a layer must be the same on all ranks between two steps, bit for bit."""
        return [] if self._predictor is None else [tensor[layer] for tensor in self._predictor.tensors]

    def error(self, layer: int) -> float:
        """Return the largest known prediction error of any rank, relative to its values: |fresh - p| / |fresh|.

        Only with a tolerance; waits for the device.
        """
        return float("inf") if self._errors is None else float(self._errors[layer].max())

    # ---- a generation ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a generation."""
        self.discard_pending()
        self.allocate()
        self.num_calls = [0] * len(self.num_calls)
        self._errors = None
        for coordinates, is_measured in self._coordinates:
            if is_measured:
                coordinates.scale(torch.ones(2, self.shape[-1], device=self.table.device))
        if self._predictor is not None:
            self._predictor.reset()

    def discard_pending(self) -> None:
        """Wait for what is under way, and forget it and what was not sent yet."""
        pending, self._pending = self._pending, []
        self._unsent.clear()
        for _, message in pending:
            message.wait()

    def apply_pending(self) -> None:
        """Take in what the others sent a step ago, if anything is under way."""
        pending, self._pending = self._pending, []
        for run, message in pending:
            self._apply(run, message.wait())

    def send_pending(self) -> None:
        """Send what waits for the rest of the group's layers to be called."""
        layers, self._unsent = sorted(self._unsent), []
        for first in [layer for layer in layers if layer - 1 not in layers]:
            last = next(layer for layer in layers if layer >= first and layer + 1 not in layers)
            self._pack(slice(first, last + 1))
            self._send(slice(first, last + 1), self._unsent_label)

    def gather(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, mode: Mode, step: int, phase: Phase
    ) -> torch.Tensor:
        """Return every patch's keys and values, as far as `mode` lets this rank know them.

        Args:
            layer: its place.
            key, value: this rank's of this step, [B, H, S, D] with H * D = C.
            mode: ``sync`` waits for everybody's of this step, exact but for the warm-up's codec; ``fresh`` waits for
                what is sent of them; ``displaced`` takes what was sent until the step before, predicted to this one,
                and sends for the next; ``frozen`` keeps what there is.
            step, phase: for error messages and counters.

        Returns:
            [2, B, N * S, C], in scratch: valid until the next call of any layer. This rank's part is fresh.
        """
        label = CollectiveLabel("kv", "", step, phase)
        if self._unsent and (layer in self._unsent or self._unsent_label != label):
            self.send_pending()
        self.apply_pending()
        fresh = self.own_values(layer)
        for own, given in zip(fresh, (key, value), strict=True):
            own.unflatten(2, (key.shape[1], -1)).copy_(given.transpose(1, 2))
        whole = self._scratch("whole", (2, self.shape[1], self._ranks, *self.shape[2:]), self.dtype)
        by_rank = whole.permute(2, 0, 1, 3, 4)
        if mode == "sync":
            self._gather_all(layer, fresh, by_rank, label)
        else:
            self._gather_sent(layer, self._coded(layer, fresh), mode, by_rank, label)
        if mode in ("sync", "fresh") or not self._predicts_fused:
            by_rank[self._rank] = fresh
        self.num_calls[layer] += 1
        return whole.flatten(2, 3)

    def own_values(self, layer: int) -> torch.Tensor:
        """Return what this rank's layer was called with last, [2, B, S, C], until the next call of another group."""
        return self._scratch("fresh", (len(self.names), *self.shape), self.dtype)[layer]

    def _gather_all(self, layer: int, fresh: torch.Tensor, out: torch.Tensor, label: CollectiveLabel) -> None:
        """Write everybody's values of this step to `out`, [N, 2, B, S, C], and keep them."""
        codec, ranks = self._warmup_codec, self._ranks
        # A refresh is exact, whatever the warm-up sends.
        warmed_up = self.num_calls[layer] >= self._config.warmup_steps
        if codec.lossless or self._config.freshness == "sync" or warmed_up:
            values = self._scratch("gathered", (ranks, *self.shape), self.dtype)
            self._collectives.all_gather(fresh, values, self._label_of(slice(layer, layer + 1), label)).wait()
            out.copy_(values)
            self._measure(layer, values)
            values = self._in_coordinates(layer, values)
        else:
            values = self._gather_changes(layer, self._coded(layer, fresh), codec, label)
            self._write(layer, values, out)
            if self._measure(layer, values):
                values = self._in_coordinates(layer, values)
        fresh = self._coded(layer, fresh)
        if self._predictor is not None:
            self._predictor.set_values(layer, values)
        elif self._config.freshness != "sync":
            kept = values.to(storage_dtypes(self._config.kv_cache_dtype, self.dtype)[0], copy=True)
            self._first[layer] = kept, fresh.clone() if self._keeps_previous else None
        if self._previous is not None:
            self._previous[layer] = fresh

    def _gather_changes(self, layer: int, fresh: torch.Tensor, codec: Codec, label: CollectiveLabel) -> torch.Tensor:
        """Return everybody's values, float32 [N, 2, B, S, C], from coded changes since the step before."""
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
        label = self._label_of(slice(layer, layer + 1), label)
        coded = self._collectives.all_gather(payload, received, label).wait()
        numbers, scales = codec.decode(coded, vectors, width, self._scratch)
        if scales is None:
            return known.add_(numbers.reshape(shape))
        return known.addcmul_(numbers.reshape(shape), scales.view(*shape[:-1], 1))

    def _gather_sent(
        self, layer: int, fresh: torch.Tensor, mode: Mode, out: torch.Tensor, label: CollectiveLabel
    ) -> None:
        """Write everybody's values to `out`, [N, 2, B, S, C], from what is sent of them after warm-up."""
        predictor = self._predictor
        assert predictor is not None, "the first step is synchronous, and buffers are made after it"
        gain = predictor.gain(layer, fresh)
        if self._layout.count and mode != "frozen":
            self._selected = self._selector.select_shared(self.table, self.shape[2])
        if mode == "fresh":
            self.send_pending()
            alone = slice(layer, layer + 1)
            self._gains[layer] = gain
            self._pack(alone)
            self._send(alone, label)
            self.apply_pending()
            self._write(layer, predictor.value[layer], out)
            return
        if self._coordinates:
            predicted = self._scratch("predicted", (self._ranks, *self.shape), torch.float32)
            predictor.predict(layer, gain, predicted)
            self._write(layer, predicted, out)
        elif self._predicts_fused:
            predictor.predict_fused(layer, gain, fresh, out)
        else:
            predictor.predict(layer, gain, out)
        if mode == "displaced":
            self._gains[layer] = gain
            self._unsent.append(layer)
            self._unsent_label = label
            # Not all of the group's layers: those of another pass may not be called in this generation.
            if len(self._unsent) == sum(num_calls > 0 for num_calls in self.num_calls):
                self.send_pending()

    @property
    def _predicts_fused(self) -> bool:
        """Tell whether a kernel writes what attention reads, this rank's fresh values too."""
        return not self._coordinates and self._predictor is not None and self._predictor.can_fuse

    # ---- coordinates -----------------------------------------------------------------------------------------------

    @property
    def _coded_as(self) -> tuple[str, torch.dtype]:
        """Name and dtype of the buffer of what is compared and coded of this rank's keys and values."""
        return ("fresh.coordinates", torch.float32) if self._coordinates else ("fresh", self.dtype)

    def _coded(self, layer: int, fresh: torch.Tensor) -> torch.Tensor:
        """Return this rank's keys and values of a layer, [2, B, S, C], in its coordinates; in scratch."""
        if not self._coordinates:
            return fresh
        name, dtype = self._coded_as
        out = self._scratch(name, (len(self.names), *self.shape), dtype)[layer]
        self._coordinates[layer][0].into(fresh[None], out[None], self._scratch)
        return out

    def _in_coordinates(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        """Return everybody's keys and values of a layer, [N, 2, B, S, C], in its coordinates; in scratch."""
        if not self._coordinates:
            return values
        out = self._scratch("predicted", tuple(values.shape), torch.float32)
        self._coordinates[layer][0].into(values, out, self._scratch)
        return out

    def _measure(self, layer: int, values: torch.Tensor) -> bool:
        """Have a layer's coordinates follow from everybody's first values, [N, 2, B, S, C], if nothing else says them.

        Returns:
            Whether they have: until then they were the values themselves.
        """
        if not self._coordinates or self.num_calls[layer] or not self._coordinates[layer][1]:
            return False
        squares = self._scratch("predicted", tuple(values.shape), torch.float32).copy_(values).square_()
        self._coordinates[layer][0].measure(squares)
        return True

    def _write(self, layer: int, values: torch.Tensor, out: torch.Tensor) -> None:
        """Write keys and values that are in a layer's coordinates to `out`, both [N, 2, B, S, C]; not this rank's."""
        if not self._coordinates:
            out.copy_(values)
            return
        coordinates = self._coordinates[layer][0]
        for others in (slice(0, self._rank), slice(self._rank + 1, self._ranks)):
            if len(values[others]):
                out[others] = coordinates.back(values[others], self._scratch)

    # ---- payloads --------------------------------------------------------------------------------------------------

    def _send(self, run: slice, label: CollectiveLabel) -> None:
        """Start sending the payloads of a run of layers; `label` names any of them."""
        first, last, size = run.start, run.stop, self._ranks * self._layout.size
        received = self._received[first * size : last * size].view(self._ranks, last - first, self._layout.size)
        pending = self._collectives.all_gather(self._payload[run], received, self._label_of(run, label))
        self._pending.append((run, pending))

    def _label_of(self, run: slice, label: CollectiveLabel) -> CollectiveLabel:
        first, last = self.names[run.start], self.names[run.stop - 1]
        return replace(label, layer=f"layer {first}" if first == last else f"layers {first} to {last}")

    def _pack(self, run: slice) -> None:
        """Fill the payloads of a run of layers from what they were called with."""
        predictor, codec, payload = self._predictor, self._payload_codec, self._payload[run]
        assert predictor is not None, "see `_gather_sent`"
        name, dtype = self._coded_as
        fresh = self._scratch(name, (len(self.names), *self.shape), dtype)[run]
        if codec.can_fuse(payload) and predictor.can_fuse and self._selects_fused:
            selected = self._select_fused(run, fresh) if self._layout.count else None
            codec.encode_fused(predictor, run, fresh, self._gains[run], payload, selected)
            return
        codec.pack_gains(payload, self._gains[run])
        tokens, own, residual = fresh, fresh, None
        if codec.of_residuals or self._layout.has_error or (self._layout.count and self._previous is None):
            own = self._scratch("own", tuple(fresh.shape), torch.float32)
            predictor.predict_own(run, self._gains[run], own)
            residual = self._scratch("residual", tuple(fresh.shape), torch.float32).copy_(fresh).sub_(own)
            tokens = residual if codec.of_residuals else fresh
        if self._layout.has_error and residual is not None:
            codec.pack_error(payload, fresh, residual)
        if self._layout.count:
            tokens = codec.pack_selected(payload, self._select(run, fresh, own, residual), tokens)
        if self._previous is not None:
            self._previous[run] = fresh
        codec.pack_tokens(payload, tokens)

    def _select(
        self, run: slice, fresh: torch.Tensor, own: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the sub-blocks that each layer of a run sends, int64 [l, k]."""
        if self._selected is not None:
            return self._selected.expand(len(fresh), -1)
        reference, difference = (own, residual) if self._previous is None else (self._previous[run], None)
        layers = self.names[0], len(self.names)
        return self._selector.select(layers, self.table, fresh, reference, difference, run)

    @property
    def _selects_fused(self) -> bool:
        """Tell whether a kernel finds the sub-blocks to send, or they are the same for all layers, or all are sent."""
        compared = self._selector.compares_by_l2 and self._previous is None
        return self._layout.count == 0 or self._selected is not None or compared

    def _select_fused(self, run: slice, fresh: torch.Tensor) -> torch.Tensor:
        """Return what `_select` does, contiguous."""
        from otil_xdit.method.kernels.payloads import block_changes

        assert self._predictor is not None, "see `_gather_sent`"
        if self._selected is not None:
            return self._selected.expand(len(fresh), -1).contiguous()
        changes = block_changes(*self._predictor.own_copies(run), fresh, self._gains[run], self.table)
        return self._selector.select_scored((self.names[0], len(self.names)), self.table, changes, run)

    def _apply(self, run: slice, received: torch.Tensor) -> None:
        """Carry the copies of a run of layers a step forward with everybody's payloads, uint8 [N, l, size]."""
        assert self._predictor is not None, "see `_gather_sent`"
        if self._payload_codec.can_fuse(received) and self._predictor.can_fuse:
            self._payload_codec.apply_fused(self._predictor, run, received)
            return
        received = received.transpose(0, 1)
        found = self._payload_codec.unpack(received)
        gains = found.gains
        if gains is None:
            constant = self._config.extrapolation_gain if self._config.extrapolation == "constant" else 0.0
            gains = torch.full((*received.shape[:2], 2), constant, device=received.device)
        if found.errors is not None:
            if self._errors is None:
                self._errors = torch.full((len(self.names), self._ranks), float("inf"), device=received.device)
            self._errors[run] = found.errors
        if self._payload_codec.of_residuals:
            self._predictor.apply_residuals(run, gains, found.numbers, found.scales, found.sent)
        else:
            values = found.numbers if found.scales is None else found.numbers * found.scales
            self._predictor.apply_values(run, gains, values, found.rows, found.sent)
