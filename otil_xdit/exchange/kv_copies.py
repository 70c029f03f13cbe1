"""The copies of a group's keys and values, which all ranks share.

Shapes: L layers; N patches, B batch, S tokens of one patch, C features.
"""

from __future__ import annotations

import torch

from otil_xdit.exchange.kv_transform import KVTransform
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.predictor import Predictor, storage_dtypes
from otil_xdit.method.scratch import ScratchBuffers


class KVCopies:
    """What all ranks know of everybody's keys and values of a group's layers, in the layers' coordinates.

    Args:
        transform: has this rank's fresh values, and the layers' shape.
        config: the settings.
        scratch: for intermediate tensors and for results.
    """

    def __init__(self, transform: KVTransform, config: OtilConfig, scratch: ScratchBuffers) -> None:
        self._transform, self._config, self._scratch = transform, config, scratch
        self._first: dict[int, torch.Tensor] = {}
        self._predictor: Predictor | None = None

    def allocate(self, layers: int) -> None:
        """Make the buffers of L layers; what the first step has brought is kept."""
        transform = self._transform
        like = torch.empty((), dtype=transform.dtype, device=self._scratch.device).expand(layers, *transform.shape)
        self._predictor = Predictor(like, transform.ranks, transform.rank, self._config, self._scratch)
        for layer, values in self._first.items():
            self._predictor.set_values(layer, values)
        self._first.clear()

    def begin(self) -> None:
        """Start a generation: nothing is known."""
        if self._predictor is not None:
            self._predictor.reset()

    @property
    def predictor(self) -> Predictor:
        """What holds the copies, and moves them from step to step."""
        assert self._predictor is not None, "the first step is synchronous, and buffers are made after it"
        return self._predictor

    @property
    def is_allocated(self) -> bool:
        return self._predictor is not None

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device."""
        kept = [*self._first.values()] if self._predictor is None else self._predictor.tensors
        return sum(tensor.nbytes for tensor in kept)

    def shared_state(self, layer: int) -> list[torch.Tensor]:
        """Return what of a layer must be the same on all ranks between two steps, bit for bit."""
        return [] if self._predictor is None else [tensor[layer] for tensor in self._predictor.tensors]

    def last_values(self, layer: int) -> torch.Tensor:
        """Return everybody's values at the step before, float32 [N, 2, B, S, C], in scratch; 0 where not known."""
        if self._predictor is not None:
            return self._predictor.last_values(layer)
        return self._scratch("known", (self._transform.ranks, *self._transform.shape), torch.float32).zero_()

    def set_values(self, layer: int, values: torch.Tensor) -> None:
        """Replace everybody's values of a layer, in its coordinates, [N, 2, B, S, C], after a synchronous step."""
        if self._predictor is not None:
            self._predictor.set_values(layer, values)
        else:
            value_dtype, _ = storage_dtypes(self._config.kv_cache_dtype, self._transform.dtype)
            self._first[layer] = values.to(value_dtype, copy=True)

    def write(self, layer: int, out: torch.Tensor) -> None:
        """Write everybody's values of this step, whose payloads have been applied, to `out`, [N, 2, B, S, C]."""
        self._transform.write(layer, self.predictor.value[layer], out)

    def write_predicted(self, layer: int, gain: torch.Tensor, out: torch.Tensor) -> None:
        """Write the prediction of everybody's values of this step to `out`; this rank's are the fresh ones.

        Args:
            layer: of the L.
            gain: float32 [2].
            out: [N, 2, B, S, C], a view of a contiguous [2, B, N, S, C].
        """
        predictor, transform = self.predictor, self._transform
        if not transform.is_identity:
            predicted = transform.coded_buffer()
            predictor.predict(layer, gain, predicted)
            transform.write(layer, predicted, out)
        elif predictor.can_fuse:
            predictor.predict_fused(layer, gain, transform.own_values(layer), out)
        else:
            predictor.predict(layer, gain, out)
            out[transform.rank] = transform.own_values(layer)
