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

WHOSE = {"own": 1, "others": 2}
"""What kernels call them; see `otil_xdit.method.kernels.adaptive_copies`, which is imported where there is Triton."""


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
        found: of `Codec.late_kernels`, each [l, N, ...].
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
    def writes_corrected(self) -> bool:
        """Tell whether `apply` can write corrected copies to where attention reads them."""
        return self._codec.writes_corrected

    def encode(
        self,
        predictor: Predictor,
        run: slice,
        changes: torch.Tensor,
        gains: torch.Tensor,
        payload: torch.Tensor,
        selected: torch.Tensor | None,
        kernel: Callable[..., None] | None = None,
    ) -> None:
        """Fill payloads in few launches.

        Args:
            predictor: whose copies everybody has.
            run: layers.
            changes: how far what they were called with is from the copies, [l, 2, B, S, C].
            gains: this rank's, float32 [l, 2].
            payload: uint8 [l, size].
            selected: sub-blocks that are sent, int64 [l, k]; None for all tokens.
            kernel: that does it, where it is not CUDA's.
        """
        layout, codec = self.layout, self._codec
        assert codec.kernels is not None, "see `can_fuse`"
        _, velocity = predictor.own_copies(run)
        places = {"indices_at": layout.error, "coded_at": layout.coded, "fitted": layout.has_gains}
        own = {"velocity": velocity, "changes": changes, "gains": gains}
        arguments, _ = codec.kernel_arguments(changes.device, layout.vectors, self._shape[-1])
        encode = kernel or kernel_of(codec.kernels[0])
        encode(**own, payload=payload, selected=selected, table=self._table, **places, **arguments)

    def apply(
        self,
        predictor: Predictor,
        run: slice,
        received: torch.Tensor,
        writing: dict[str, Any] | None = None,
        kernel: Callable[..., None] | None = None,
    ) -> None:
        """Do what `PayloadCodec.unpack` and the predictor's `apply_residuals` do, in few launches.

        Args:
            predictor: whose copies are advanced.
            run: layers.
            received: everybody's payloads, uint8 [N, l, size].
            writing: see `KVTransform.writing`; None to write the copies alone.
            kernel: that does it, where it is not CUDA's.
        """
        layout, codec = self.layout, self._codec
        assert codec.kernels is not None, "see `can_fuse`"
        places = {"indices_at": layout.error, "coded_at": layout.coded, "count": layout.count}
        _, arguments = codec.kernel_arguments(received.device, layout.vectors, self._shape[-1])
        correct = kernel or kernel_of(codec.kernels[1])
        given = {**arguments, **places, **(writing or {})}
        predictor.apply_coded(run, partial(correct, received=received, table=self._table, **given))

    @property
    def applies_late(self) -> bool:
        """Tell whether `read` and `advance` can take the place of `apply`."""
        return self._codec.late_kernels is not None

    def read(self, predictor: Predictor, run: slice, received: torch.Tensor) -> ReadPayloads:
        """Find how everybody's payloads of a run of layers are coded, uint8 [N, l, size]; advance the copies' ages."""
        layout, codec, (_, batch, tokens, width) = self.layout, self._codec, self._shape
        assert codec.late_kernels is not None, "see `applies_late`"
        _, arguments = codec.kernel_arguments(received.device, layout.vectors, width)
        places = layout.error, layout.coded, layout.count, arguments["upgrades"], arguments["rows"]
        read: Callable[..., Any] = kernel_of(codec.late_kernels[0])
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
            whose: "own" or "others".
            own: this rank.
            writing: where the copies of one layer go as attention reads them, see `KVTransform.writing`, and how they
                are extrapolated for it, see `KVCopies.extrapolating`; None to write the copies alone.
        """
        layout, codec, (_, batch, _, width) = self.layout, self._codec, self._shape
        assert codec.late_kernels is not None, "see `applies_late`"
        _, arguments = codec.kernel_arguments(read.received.device, layout.vectors, width)
        words, slots, share = read.found
        coded: dict[str, Any] = {"received": read.received, "words": words, "slots": slots, "share": share}
        coded |= {"scales": arguments["scales"], "rows": arguments["rows"], "coded_at": layout.coded}
        nothing: dict[str, Any] = {"matrices": None, "out": None, "heads": 1, "totals": None, "predicts": False}
        given = {**nothing, **(writing or {}), "own": own, "whose": WHOSE[whose], "sent": layout.vectors // (2 * batch)}
        predictor.advance(run, partial(kernel_of(codec.late_kernels[1]), **coded, **given))
