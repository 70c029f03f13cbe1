"""Keys and values at a synchronous step, which brings everybody's: coded in warm-up, as they are at a refresh.

Each has two ways: kernels, two or three launches on a GPU, and the eager code that is their reference.

Shapes: N patches, B batch, S tokens of one patch, C features.
"""

from __future__ import annotations

from functools import partial

import torch

from otil_xdit.comm.collectives import CollectiveLabel
from otil_xdit.exchange.kv_coder import KVCoder
from otil_xdit.exchange.kv_copies import KVCopies
from otil_xdit.exchange.kv_kernels import kernel_of
from otil_xdit.exchange.kv_messages import KVMessages
from otil_xdit.exchange.kv_transform import KVTransform
from otil_xdit.method.codecs import make_codec
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.kernels import MOST_FEATURES, is_fused
from otil_xdit.method.scratch import ScratchBuffers


class SynchronousKV:
    """Gathers a group's keys and values of this step, one layer after the other, and has the copies become them.

    Args:
        transform: takes this rank's values, and has the layers' shape.
        copies: of all ranks' values.
        coder: is told what the copies have become.
        messages: carry what is sent.
        table: int64 [K, T], the tokens of each sub-block, on the layers' device.
        config: the settings.
        scratch: for intermediate tensors.
    """

    def __init__(
        self,
        transform: KVTransform,
        copies: KVCopies,
        coder: KVCoder,
        messages: KVMessages,
        table: torch.Tensor,
        config: OtilConfig,
        scratch: ScratchBuffers,
    ) -> None:
        self._transform, self._copies, self._coder, self._messages = transform, copies, coder, messages
        self._table, self._config, self._scratch = table, config, scratch
        self._codec = make_codec(config.warmup_codec, transform.dtype)
        self._keeps_copies = config.freshness != "sync"

    def gather(
        self,
        layer: int,
        called_with: tuple[torch.Tensor, torch.Tensor],
        num_calls: int,
        out: torch.Tensor,
        label: CollectiveLabel,
    ) -> None:
        """Write everybody's keys and values of this step to `out`, and keep them.

        Args:
            layer: its place.
            called_with: this rank's, each [B, H, S, D].
            num_calls: how often the layer was called before in this generation.
            out: [N, 2, B, S, C], a view of a contiguous [2, B, N, S, C].
            label: of the step.
        """
        # A refresh is exact, whatever the warm-up sends.
        codes = not self._codec.lossless and self._keeps_copies and num_calls < self._config.warmup_steps
        # Eager code finds the coordinates that weights do not say.
        finds = num_calls == 0 and self._transform.is_measured(layer)
        fuses = is_fused(self._table) and self._keeps_copies and not finds
        if codes and fuses and self._codec.set_kernel is not None and self._transform.shape[-1] <= MOST_FEATURES:
            self._gather_changes_fused(layer, called_with, out, label)
            return
        self._transform.set_own(layer, *called_with)
        if codes:
            self._gather_changes(layer, num_calls == 0, out, label)
        elif fuses:
            self._gather_whole_fused(layer, out, label)
        else:
            self._gather_whole(layer, num_calls == 0, out, label)

    def _gather_whole(self, layer: int, is_first: bool, out: torch.Tensor, label: CollectiveLabel) -> None:
        values = self._whole(layer, label)
        out.copy_(values)
        if is_first:
            self._transform.measure(layer, values)
        self._keep(layer, self._transform.code(layer, values))

    def _gather_whole_fused(self, layer: int, out: torch.Tensor, label: CollectiveLabel) -> None:
        from otil_xdit.method.kernels.gathered import set_gathered

        writing = self._transform.writing(layer, out)
        arguments = {"matrices": self._transform.into(layer), "out": writing["out"], "heads": writing["heads"]}
        self._copies.set_by_kernel(layer, partial(set_gathered, self._whole(layer, label), **arguments))
        if self._coder.keeps_previous:
            self._coder.set_previous(layer, self._transform.code_own(layer))

    def _whole(self, layer: int, label: CollectiveLabel) -> torch.Tensor:
        """Return everybody's keys and values of a layer, [N, 2, B, S, C], in scratch."""
        transform = self._transform
        values = self._scratch("gathered", (transform.ranks, *transform.shape), transform.dtype)
        return self._messages.gather_now(layer, transform.own_values(layer), values, label)

    def _gather_changes(self, layer: int, is_first: bool, out: torch.Tensor, label: CollectiveLabel) -> None:
        values = self._changed(layer, label)
        self._transform.write(layer, values, out)
        if is_first and self._transform.measure(layer, values):
            values = self._transform.code(layer, values)
        self._keep(layer, values)

    def _keep(self, layer: int, values: torch.Tensor) -> None:
        """Have the copies become everybody's values, [N, 2, B, S, C], in the layer's coordinates."""
        if self._keeps_copies:
            self._copies.set_values(layer, values)
            self._coder.set_previous(layer, self._transform.code_own(layer))

    def _changed(self, layer: int, label: CollectiveLabel) -> torch.Tensor:
        """Return everybody's coded values, float32 [N, 2, B, S, C], from coded changes since the step before."""
        transform, codec = self._transform, self._codec
        ranks, width, vectors = transform.ranks, transform.shape[-1], transform.shape[:-1].numel()
        shape = (ranks, *transform.shape)
        changes = self._scratch("residual", tuple(transform.shape), torch.float32).copy_(transform.code_own(layer))
        if codec.of_residuals:
            known = self._copies.last_values(layer)
        else:
            known = self._scratch("known", shape, torch.float32).zero_()
        changes.sub_(known[transform.rank])
        payload, received = self._buffers(vectors, width)
        codec.encode(changes.view(vectors, width), payload, self._scratch)
        coded = self._messages.gather_now(layer, payload, received, label)
        numbers, scales = codec.decode(coded, vectors, width, self._scratch)
        if scales is None:
            return known.add_(numbers.reshape(shape))
        return known.addcmul_(numbers.reshape(shape), scales.view(*shape[:-1], 1))

    def _gather_changes_fused(
        self,
        layer: int,
        called_with: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        label: CollectiveLabel,
    ) -> None:
        transform, codec = self._transform, self._codec
        assert codec.kernels is not None and codec.set_kernel is not None, "see `gather`"
        known = self._copies.last_own(layer)
        transform.take_own(layer, called_with, out[transform.rank], known is not None, copies=known)
        vectors, width = transform.shape[:-1].numel(), transform.shape[-1]
        payload, received = self._buffers(vectors, width)
        encoding, decoding = codec.kernel_arguments(payload.device, vectors, width)
        changes = transform.coded_own(slice(layer, layer + 1))
        kernel_of(codec.kernels[0])(
            changes, None, None, payload[None], None, self._table, indices_at=0, coded_at=0, travels=False,
            **encoding,
        )  # fmt: skip
        coded = self._messages.gather_now(layer, payload, received, label)
        arguments = {"received": coded, **decoding, **transform.writing(layer, out)}
        self._copies.set_by_kernel(layer, partial(kernel_of(codec.set_kernel), **arguments))
        if self._coder.keeps_previous:
            transform.set_own(layer, *called_with)
            self._coder.set_previous(layer, transform.code_own(layer))

    def _buffers(self, vectors: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scratch for this rank's coded changes, uint8 [size], and for everybody's, [N, size]."""
        payload = self._scratch("payload", (self._codec.size(vectors, width),), torch.uint8)
        return payload, self._scratch("received", (self._transform.ranks, payload.numel()), torch.uint8)
