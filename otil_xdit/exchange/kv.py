"""Keys and values across the patches: what a rank waits for, sends and keeps at a step, by mode.

Shapes: L layers; N patches, B batch, S tokens of one patch, C features (heads x head dimension), K sub-blocks of T
tokens.
"""

from __future__ import annotations

import torch

from otil_xdit.comm.collectives import CollectiveLabel, Collectives, Phase
from otil_xdit.exchange.kv_coder import KVCoder
from otil_xdit.exchange.kv_copies import KVCopies
from otil_xdit.exchange.kv_messages import KVMessages
from otil_xdit.exchange.kv_synchronous import SynchronousKV
from otil_xdit.exchange.kv_transform import KVTransform
from otil_xdit.exchange.pass_agreement import PassAgreement
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.coordinates import Coordinates
from otil_xdit.method.gain_trend import GainTrend
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
    """Attention layers of equal shape that are called one after the other: what is done at a step, by mode.

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
        trend: of the gains of all groups' layers.
        agreement: with the ranks of the other pass, at steps that wait; None where there is nothing to agree on.
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
        trend: GainTrend,
        agreement: PassAgreement | None = None,
    ) -> None:
        self.shape, self.dtype, self.table = shape, dtype, table
        self.num_calls: list[int] = []
        self.names: list[str] = []
        self._config, self._scratch = config, scratch
        self._transform = KVTransform(shape, dtype, collectives.group, scratch)
        self._copies = KVCopies(self._transform, config, scratch)
        self._coder = KVCoder(self._transform, self._copies, table, config, selector, scratch, trend, agreement)
        self._messages = KVMessages(collectives, self._coder, self.names)
        parts = self._transform, self._copies, self._coder, self._messages
        self._synchronous = SynchronousKV(*parts, table, config, scratch)

    # ---- layers and buffers ----------------------------------------------------------------------------------------

    def fits(self, shape: torch.Size, dtype: torch.dtype, table: torch.Tensor) -> bool:
        """Tell whether a layer of these may join now."""
        same = self.shape == shape and self.dtype == dtype and self.table is table
        layers, values = len(self.names) + 1, self.shape.numel()
        small = layers <= MOST_LAYERS and (self._coder.is_one_pass or layers * values <= MOST_VALUES)
        light = layers * self._coder.payload_size <= values * self.dtype.itemsize
        return same and small and light and not self._copies.is_allocated

    def join(self, name: str, coordinates: tuple[Coordinates, bool] | None = None) -> int:
        """Add a layer, and return its place.

        Args:
            name: of the layer.
            coordinates: the layer's, and whether they follow from its first keys and values; None for all layers, or
                for none.
        """
        self.names.append(name)
        self.num_calls.append(0)
        self._transform.join(coordinates)
        return len(self.names) - 1

    def allocate(self) -> None:
        """Make the buffers of the layers that have joined; no other joins any more."""
        if self._copies.is_allocated or self._config.freshness == "sync":
            return
        self._copies.allocate(len(self.names))
        self._coder.allocate(self.names[0], len(self.names))
        self._messages.allocate(self.table.device)

    @property
    def nbytes(self) -> int:
        """Bytes that the layers keep on their device."""
        return sum(part.nbytes for part in (self._transform, self._copies, self._coder, self._messages))

    def shared_state(self, layer: int) -> list[torch.Tensor]:
        """Return what of a layer must be the same on all ranks between two steps, bit for bit."""
        self._coder.settle(slice(layer, layer + 1))
        return self._copies.shared_state(layer)

    def numbers(self, layer: int) -> torch.Tensor:
        """Return numbers of which one is NaN or Inf if one is that this rank's layer was called with last."""
        return self._transform.numbers(layer)

    @property
    def expected_gains(self) -> torch.Tensor:
        """See `KVCoder.expected_gains`."""
        return self._coder.expected_gains

    @property
    def is_allocated(self) -> bool:
        """Tell whether the layers have buffers: from their second call on."""
        return self._copies.is_allocated

    def error(self, layer: int) -> float:
        """Return the largest known prediction error of any rank; see `KVCoder.error`."""
        return self._coder.error(layer)

    # ---- a generation ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a generation."""
        self.discard_pending()
        self.allocate()
        self.num_calls = [0] * len(self.num_calls)
        for part in (self._transform, self._copies, self._coder):
            part.begin()

    def discard_pending(self) -> None:
        """Wait for what is under way, and forget it and what was not sent yet."""
        self._messages.discard()

    def apply_pending(self) -> None:
        """Take in what the others sent a step ago, if anything is under way."""
        self._messages.apply_pending()
        self._coder.settle()

    def send_pending(self) -> None:
        """Send what waits for the rest of the group's layers to be called."""
        self._messages.send_deferred()

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
        self._messages.send_before(layer, label)
        if mode == "sync":
            self.apply_pending()
        elif mode == "fresh":
            self._messages.apply_pending()
        else:
            self._messages.take_pending()
        whole = self._scratch("whole", (2, self.shape[1], self._transform.ranks, *self.shape[2:]), self.dtype)
        by_rank = whole.permute(2, 0, 1, 3, 4)
        if mode == "sync":
            self._synchronous.gather(layer, (key, value), self.num_calls[layer], by_rank, label)
        else:
            self._coder.take_own(layer, key, value, by_rank, label, step if mode == "fresh" else None)
            if mode == "fresh":
                self._gather_sent(layer, by_rank, label)
            else:
                self._gather_late(layer, by_rank, label if mode == "displaced" else None)
        self.num_calls[layer] += 1
        return whole.flatten(2, 3)

    def _gather_sent(self, layer: int, out: torch.Tensor, label: CollectiveLabel) -> None:
        """Write to `out`, [N, 2, B, S, C], what follows from everybody's payloads of this step: mode ``fresh``."""
        self._coder.select_shared()
        self._messages.send_deferred()
        self._messages.exchange_now(layer, label, out)

    def _gather_late(self, layer: int, out: torch.Tensor, label: CollectiveLabel | None) -> None:
        """Write the prediction of this step to `out`, [N, 2, B, S, C]: modes ``displaced`` and ``frozen``.

        Without a label, in the latter, nothing is sent.
        """
        if label is not None:
            self._coder.select_shared()
        self._coder.write_predicted(layer, out)
        if label is not None:
            self._messages.defer(layer, label, sum(num_calls > 0 for num_calls in self.num_calls))
