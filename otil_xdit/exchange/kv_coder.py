"""What a rank says of a group's layers at a step, and how the copies follow from what everybody says.

`pack` and `apply` have two ways each: kernels, one or two launches on a GPU, and the eager code that is their
reference.

Shapes: L layers, l of them in a run; N patches, B batch, S tokens of one patch, C features, K sub-blocks of T tokens, k
sent a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from otil_xdit.comm.collectives import CollectiveLabel
from otil_xdit.exchange.kv_arrived import ArrivedPayloads
from otil_xdit.exchange.kv_copies import KVCopies
from otil_xdit.exchange.kv_kernels import PayloadKernels
from otil_xdit.exchange.kv_payload import PayloadCodec
from otil_xdit.exchange.kv_residuals import KVResiduals
from otil_xdit.exchange.kv_selection import KVSelection
from otil_xdit.exchange.kv_transform import KVTransform
from otil_xdit.exchange.pass_agreement import ALL_FROM, PassAgreement
from otil_xdit.method.codecs import make_codec
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.gain_trend import GainTrend
from otil_xdit.method.scratch import ScratchBuffers
from otil_xdit.method.selection import BlockSelector


@dataclass(frozen=True)
class PayloadFormat:
    """How the payload of a layer is laid out, and what writes and reads it.

    Attributes:
        codec: by eager code.
        kernels: by kernels.
    """

    codec: PayloadCodec
    kernels: PayloadKernels

    @property
    def size(self) -> int:
        """Bytes of one layer's payload."""
        return self.codec.layout.size

    @classmethod
    def of(
        cls, transform: KVTransform, table: torch.Tensor, config: OtilConfig, scratch: ScratchBuffers
    ) -> PayloadFormat:
        """Return what `config` says; arguments as of `KVCoder`."""
        codec = PayloadCodec(transform.shape, transform.dtype, table, config, scratch)
        coder = make_codec(config.codec, transform.dtype)
        return cls(codec, PayloadKernels(codec.layout, coder, transform.shape, table))


class KVCoder:
    """Codes what the others' copies lack of a group's layers, where most is lacking, and applies such payloads.

    Over 200 lines: whatever is done has two ways, and here it is decided which one is taken.

    Attributes:
        most_bytes: of one layer's largest payload.

    Args:
        transform: has this rank's fresh values, and the layers' shape.
        copies: of all ranks' values.
        table: int64 [K, T], the tokens of each sub-block, on the layers' device.
        config: the settings.
        selector: says what to send.
        scratch: for intermediate tensors.
        trend: of the gains of all layers.
        agreement: with the ranks of the other pass; None where there is nothing to agree on.
    """

    def __init__(
        self,
        transform: KVTransform,
        copies: KVCopies,
        table: torch.Tensor,
        config: OtilConfig,
        selector: BlockSelector,
        scratch: ScratchBuffers,
        trend: GainTrend,
        agreement: PassAgreement | None = None,
    ) -> None:
        self._transform, self._copies, self._table = transform, copies, table
        self._config, self._scratch, self._agreement = config, scratch, agreement
        self._residuals = KVResiduals(transform, copies, config, scratch, trend)
        self._selection = KVSelection(transform, self._residuals, table, config, selector, scratch)
        self._format = self._format_of_all = PayloadFormat.of(transform, table, config, scratch)
        self._formats = [self._format]
        if agreement is not None and ALL_FROM <= config.ratio < 1:
            self._format_of_all = PayloadFormat.of(transform, table, config.replace(ratio=1.0), scratch)
            self._formats.append(self._format_of_all)
        self.most_bytes = max(one.size for one in self._formats)
        self._arrived = ArrivedPayloads(transform, copies)
        self._errors: torch.Tensor | None = None

    def allocate(self, name: str, layers: int) -> None:
        """Make the buffers of L layers, the first of which is called `name`."""
        device = self._scratch.device
        self._name = f"layer {name}" if layers == 1 else f"one of {layers} layers from {name}"
        self._residuals.allocate(layers)
        self._selection.allocate(name, layers)
        self._payload = torch.zeros(layers * self.most_bytes, dtype=torch.uint8, device=device)
        for one in self._formats:
            one.codec.allocate(layers, self._transform.ranks)

    def begin(self) -> None:
        """Start a generation."""
        self._errors = None
        self._arrived.clear()
        self._residuals.begin()

    @property
    def payload_size(self) -> int:
        """Bytes of one layer's payload of selected sub-blocks."""
        return self._format.size

    @property
    def is_one_pass(self) -> bool:
        """Tell whether kernels compute in one pass what the eager code has buffers of all layers for."""
        return self._format.kernels.can_fuse(self._table)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device."""
        own = self._payload.nbytes if self._copies.is_allocated else 0
        coding = sum(one.codec.nbytes for one in self._formats)
        return own + self._residuals.nbytes + self._selection.nbytes + coding

    def error(self, layer: int) -> float:
        """Return the largest known prediction error of any rank, relative to its values: |fresh - p| / |fresh|.

        Only with a tolerance; waits for the device.
        """
        return float("inf") if self._errors is None else float(self._errors[layer].max())

    @property
    def expected_gains(self) -> torch.Tensor:
        """What is expected of all layers' next gains, float32 [L, 2], to be replaced where ranks agree on others."""
        return self._residuals.expected

    @property
    def keeps_previous(self) -> bool:
        """Tell whether `set_previous` matters."""
        return self._selection.keeps_previous

    def set_previous(self, layer: int, fresh: torch.Tensor) -> None:
        """Take note of a layer's values, coded [2, B, S, C], at a step where nothing was selected of them."""
        self._selection.set_previous(layer, fresh)

    def select_shared(self) -> None:
        """Select the sub-blocks that all layers send at this step; see `BlockSelector.select_shared` when to call."""
        self._selection.select_shared()

    def pack(self, run: slice, is_awaited: bool) -> torch.Tensor:
        """Fill the payloads of a run of layers from what they were called with, and return them, uint8 [l, size].

        Those that are waited for may have all sub-blocks where each pass of guidance has its own ranks; see
        `otil_xdit.exchange.pass_agreement`.

        Args:
            run: layers.
            is_awaited: whether everybody waits for them at this step.
        """
        form = self._format_where(is_awaited)
        first, size = run.start * self.most_bytes, form.size
        payload = self._payload[first : first + (run.stop - run.start) * size].view(-1, size)
        own, gains = self._transform.coded_own(run), (self._residuals.gains[run], self._residuals.fitted[run])
        if self.codes_changes:
            selected = self._selection.select_by_kernel(run, not form.codec.layout.count, is_awaited)
            form.kernels.encode(own, self._residuals.tile_sizes(run), *gains, payload, selected)
        else:
            self._residuals.settle(run, self._table, None, is_awaited)
            self._pack_by_eager(run, own, payload, form.codec)
        return payload

    def take_own(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        label: CollectiveLabel,
        awaited_at: int | None,
    ) -> None:
        """Do what `KVResiduals.take_own` does, of copies that follow first what was taken of that layer.

        Its first gains are the mean of those that the ranks of both passes find, which is waited for.
        """
        following = self._arrived.follow_own(layer) if self._applies_late else {}
        agree = partial(self._agreed_gains, label)
        self._residuals.take_own(layer, key, value, out, self.codes_changes, following, agree, awaited_at)

    def _agreed_gains(self, label: CollectiveLabel, gains: torch.Tensor) -> torch.Tensor:
        """Return the mean of a layer's gains of both passes, float32 [2]."""
        if self._agreement is None:
            return gains
        return self._agreement.mean([gains], replace(label, layer=f"the first gains of {self._name}"))[0]

    def take(self, run: slice, received: torch.Tensor, is_awaited: bool) -> None:
        """Do what `apply` does, or as much of it as is wanted before `take_own`, `write_predicted` or `settle`."""
        if self._applies_late:
            self._arrived.take(run, received, self._format_where(is_awaited).kernels)
        else:
            self.apply(run, received, is_awaited)

    def write_predicted(self, layer: int, out: torch.Tensor) -> None:
        """Do what `KVResiduals.write_predicted` does, after what was taken of that layer."""
        if not self._arrived.write_predicted(layer, out, self._residuals.extrapolating(layer)):
            self._residuals.write_predicted(layer, out)

    def settle(self, run: slice | None = None) -> None:
        """Have all copies follow what was taken, of all layers or of those that `ArrivedPayloads.settle` says."""
        self._arrived.settle(run)

    def apply(self, run: slice, received: torch.Tensor, is_awaited: bool, out: torch.Tensor | None = None) -> None:
        """Carry the copies of a run of layers a step forward with everybody's payloads.

        Args:
            run: layers.
            received: uint8 [N, l, size].
            is_awaited: as everybody said to `pack`.
            out: becomes everybody's values of the one layer that the run is, as of `KVCopies.write`.
        """
        form = self._format_where(is_awaited)
        if out is not None and self._applies_late:
            self._arrived.take(run, received, form.kernels)
            self._arrived.write(run.start, out)
            return
        self._arrived.settle(run)
        if form.kernels.can_fuse(received) and self._copies.predictor.can_fuse:
            form.kernels.apply(self._copies.predictor, run, received)
        else:
            self._apply_by_eager(run, received.transpose(0, 1), form.codec)
        if out is not None:
            self._copies.write(run.start, out)

    @property
    def codes_changes(self) -> bool:
        """Tell whether kernels score, select and code, from how far values are from their copies."""
        fuses = self._format.kernels.can_fuse(self._payload) and self._copies.predictor.can_fuse
        return fuses and self._selection.is_one_pass

    @property
    def _applies_late(self) -> bool:
        """Tell whether copies follow payloads when they are read: this rank's own when its layer is called."""
        return self._format.kernels.applies_late and self.codes_changes

    def _format_where(self, is_awaited: bool) -> PayloadFormat:
        """Return the format of payloads that are waited for, or of others; their sizes may be equal."""
        return self._format_of_all if is_awaited else self._format

    def _pack_by_eager(self, run: slice, fresh: torch.Tensor, payload: torch.Tensor, codec: PayloadCodec) -> None:
        layout = codec.layout
        codec.pack_gains(payload, self._residuals.gains[run], self._residuals.fitted[run])
        tokens, residual, sizes = fresh, None, None
        if codec.of_residuals or layout.has_error or self._selection.compares_with_prediction:
            residual = self._residuals.of(run)
            tokens = residual if codec.of_residuals else fresh
        if codec.by_feature:
            sizes = codec.sizes(tokens)
        if layout.has_error and residual is not None:
            codec.pack_error(payload, fresh, residual)
        if layout.count:
            selected = self._selection.select(run, lambda: self._selection.compare(run, residual))
            tokens = codec.pack_selected(payload, selected, tokens)
        self._selection.set_previous(run, fresh)
        codec.pack_tokens(payload, tokens, sizes)

    def _apply_by_eager(self, run: slice, received: torch.Tensor, codec: PayloadCodec) -> None:
        """Do what `apply` does; `received` is [l, N, size]."""
        predictor, found = self._copies.predictor, codec.unpack(received)
        gains = found.gains
        if gains is None:
            constant = self._config.extrapolation_gain if self._config.extrapolation == "constant" else 0.0
            gains = torch.full((*received.shape[:2], 2, 2), constant, device=received.device)
        if found.errors is not None:
            if self._errors is None:
                shape = len(self._residuals.gains), self._transform.ranks
                self._errors = torch.full(shape, float("inf"), device=received.device)
            self._errors[run] = found.errors
        if codec.of_residuals:
            predictor.apply_residuals(run, gains, found.numbers, found.scales, found.sent)
        else:
            values = found.numbers if found.scales is None else found.numbers * found.scales
            predictor.apply_values(run, gains, values, found.rows, found.sent)
