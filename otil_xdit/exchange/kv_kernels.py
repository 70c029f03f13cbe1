"""The payload of a group of layers, written and read by kernels; `otil_xdit.exchange.kv_payload` has the eager way.

Shapes: l layers of a run; N patches, B batch, S tokens of one patch, C features, K sub-blocks of T tokens, k sent a
step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch

from otil_xdit.exchange.kv_payload import PayloadLayout
from otil_xdit.method.codec import Codec
from otil_xdit.method.kernels import MOST_FEATURES, is_fused
from otil_xdit.method.predictor import Predictor

WHOSE = {"all": 0, "own": 1, "others": 2}
"""Whose copies follow, as kernels call them; see `otil_xdit.method.kernels.adaptive_copies`, which is imported where
there is Triton."""


def kernel_of(name: str) -> Callable[..., None]:
    """Return the operator ``module:name`` of `otil_xdit.method.kernels`."""
    module, _, operator = name.partition(":")
    found: Callable[..., None] = getattr(import_module(f"otil_xdit.method.kernels.{module}"), operator)
    return found


@dataclass(frozen=True)
class ReadPayloads:
    """The payloads of a run of layers from all ranks, and how they are coded, as kernels find it.

    Attributes:
        received: uint8 [N, l, size].
        found: of `Codec.read_kernel`, each [l, N, ...].
    """

    received: torch.Tensor
    found: tuple[torch.Tensor, ...]

    def of_layer(self, place: int) -> ReadPayloads:
        """Return what is known of one of the layers."""
        here = slice(place, place + 1)
        return ReadPayloads(self.received[:, here], tuple(part[here] for part in self.found))


class PayloadKernels:
    """Writes and reads the payloads of layers of equal shape in few launches.

    Args:
        layout: of a payload.
        codec: of its tokens.
        shape: of one rank's keys and values of one layer, [2, B, S, C].
        table: int64 [K, T], the tokens of each sub-block, on the layers' device.
    """

    def __init__(self, layout: PayloadLayout, codec: Codec, shape: torch.Size, table: torch.Tensor) -> None:
        self.layout, self._codec, self._shape, self._table = layout, codec, shape, table

    def can_fuse(self, tensor: torch.Tensor) -> bool:
        """Tell whether these can take the place of eager code, on that device."""
        fits = self._codec.kernels is not None and self._shape[-1] <= MOST_FEATURES
        return is_fused(tensor) and fits and not self.layout.has_error

    @property
    def applies_late(self) -> bool:
        """Tell whether copies can follow payloads, by `read` and `advance`, when they are wanted."""
        return self._codec.read_kernel is not None

    def encode(
        self,
        residuals: torch.Tensor,
        sizes: torch.Tensor,
        gains: torch.Tensor,
        fitted: torch.Tensor,
        payload: torch.Tensor,
        selected: torch.Tensor | None,
        kernel: Callable[..., None] | None = None,
    ) -> None:
        """Fill the payloads of a run of layers in few launches.

        Args:
            residuals: what the others' prediction lacks, [l, 2, B, S, C].
            sizes: of their features, as of `KVResiduals.tile_sizes`; read by codecs that go by feature.
            gains: of that prediction, float32 [l, 2].
            fitted: of tokens that are not sent, float32 [l, 2].
            payload: uint8 [l, size].
            selected: sub-blocks that are sent, int64 [l, k]; None for all tokens.
            kernel: that does it, where it is not CUDA's.
        """
        layout, codec = self.layout, self._codec
        assert codec.kernels is not None, "see `can_fuse`"
        places = {"indices_at": layout.error, "coded_at": layout.coded, "travels": layout.has_gains}
        own = {"residuals": residuals, "gains": gains, "fitted": fitted}
        if codec.by_feature:
            own["sizes"] = sizes
        arguments, _ = codec.kernel_arguments(residuals.device, layout.vectors, self._shape[-1])
        encode = kernel or kernel_of(codec.kernels[0])
        encode(**own, payload=payload, selected=selected, table=self._table, **places, **arguments)

    def apply(
        self,
        predictor: Predictor,
        run: slice,
        received: torch.Tensor,
        kernel: Callable[..., None] | None = None,
    ) -> None:
        """Do what `PayloadCodec.unpack` and the predictor's `apply_residuals` do, in few launches.

        Args:
            predictor: whose copies are advanced.
            run: layers.
            received: everybody's payloads, uint8 [N, l, size].
            kernel: that does it, where it is not CUDA's.
        """
        if self.applies_late:
            self.advance(predictor, run, self.read(predictor, run, received), "all", 0)
            return
        layout, codec = self.layout, self._codec
        assert codec.kernels is not None, "see `can_fuse`"
        places = {"indices_at": layout.error, "coded_at": layout.coded, "count": layout.count}
        _, arguments = codec.kernel_arguments(received.device, layout.vectors, self._shape[-1])
        correct = kernel or kernel_of(codec.kernels[1])
        predictor.apply_coded(run, partial(correct, received=received, table=self._table, **arguments, **places))

    def read(self, predictor: Predictor, run: slice, received: torch.Tensor) -> ReadPayloads:
        """Find how everybody's payloads of a run of layers are coded, uint8 [N, l, size]; advance the copies' ages."""
        layout, codec, (_, batch, tokens, width) = self.layout, self._codec, self._shape
        assert codec.read_kernel is not None, "see `applies_late`"
        _, arguments = codec.kernel_arguments(received.device, layout.vectors, width)
        places = layout.error, layout.coded, layout.count, arguments["upgrades"], arguments["rows"]
        read: Callable[..., Any] = kernel_of(codec.read_kernel)
        found = read(received, self._table, predictor.ages(run), *places, width, batch, tokens)
        return ReadPayloads(received, found)

    def advance(
        self,
        predictor: Predictor,
        run: slice,
        read: ReadPayloads,
        whose: str,
        own: int,
        writing: dict[str, Any] | None = None,
    ) -> None:
        """Have the copies of some ranks follow payloads that have been read.

        Args:
            predictor: whose copies are advanced.
            run: layers.
            read: their payloads.
            whose: one of `WHOSE`.
            own: this rank.
            writing: where the copies of one layer go as attention reads them, see `KVTransform.writing`, and how they
                are extrapolated for it, see `KVResiduals.extrapolating`; None to write the copies alone.
        """
        codec = self._codec
        assert codec.kernels is not None, "see `applies_late`"
        words, slots, share = read.found
        nothing: dict[str, Any] = {"matrices": None, "out": None, "heads": 1, "totals": None, "gains": None}
        given = {**nothing, **(writing or {}), "own": own, "whose": WHOSE[whose]}
        coded = {"received": read.received, "words": words, "slots": slots, "share": share, **self._coded(read)}
        predictor.advance(run, partial(kernel_of(codec.kernels[1]), **coded, **given))

    def following(self, predictor: Predictor, read: ReadPayloads, own: int) -> dict[str, Any]:
        """Return what a kernel needs that has this rank's copies of one layer follow before it compares with them.

        Args:
            predictor: whose copies these are.
            read: the layer's payloads.
            own: this rank.
        """
        words, slots, share = (found[0, own] for found in read.found)
        coded = {"received": read.received[own, 0], "words": words, "slots": slots, "share": share}
        return {**coded, **self._coded(read), **predictor.formula}

    def _coded(self, read: ReadPayloads) -> dict[str, Any]:
        """Return what is the same in all payloads that are followed."""
        layout, (_, batch, _, width) = self.layout, self._shape
        _, arguments = self._codec.kernel_arguments(read.received.device, layout.vectors, width)
        places = {"coded_at": layout.coded, "sent": layout.vectors // (2 * batch)}
        return {"scales": arguments["scales"], "rows": arguments["rows"], **places}
