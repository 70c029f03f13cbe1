"""The copies of a group's keys and values, which all ranks share.

Shapes: L layers; N patches, B batch, S tokens of one patch, C features.
"""

from __future__ import annotations

from collections.abc import Callable

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
        if self._predictor is None:
            return sum(tensor.nbytes for tensor in self._first.values())
        return sum(tensor.nbytes for tensor in self._predictor.tensors)

    def shared_state(self, layer: int) -> list[torch.Tensor]:
        """Return what of a layer must be the same on all ranks between two steps, bit for bit."""
        return [] if self._predictor is None else [tensor[layer] for tensor in self._predictor.tensors]

    def last_values(self, layer: int) -> torch.Tensor:
        """Return everybody's values at the step before, float32 [N, 2, B, S, C], in scratch; 0 where not known."""
        if self._predictor is not None:
            return self._predictor.last_values(layer)
        return self._scratch("known", (self._transform.ranks, *self._transform.shape), torch.float32).zero_()

    def last_own(self, layer: int) -> torch.Tensor | None:
        """Return this rank's part of `last_values`, [2, B, S, C], as it is kept; None where it is not known."""
        if self._predictor is None or not self._predictor.is_known(layer):
            return None
        return self._predictor.own_copies(layer)[0]

    def set_values(self, layer: int, values: torch.Tensor) -> None:
        """Replace everybody's values of a layer, in its coordinates, [N, 2, B, S, C], after a synchronous step."""
        if self._predictor is not None:
            self._predictor.set_values(layer, values)
        else:
            value_dtype, _ = storage_dtypes(self._config.kv_cache_dtype, self._transform.dtype)
            self._first[layer] = values.to(value_dtype, copy=True)

    def set_by_kernel(self, layer: int, replace: Callable[..., None]) -> None:
        """Do what `set_values` does, by a kernel; see `Predictor.set_by_kernel`."""
        if self._predictor is not None:
            self._predictor.set_by_kernel(layer, replace)
            return
        value_dtype, _ = storage_dtypes(self._config.kv_cache_dtype, self._transform.dtype)
        shape = self._transform.ranks, *self._transform.shape
        value = self._first[layer] = torch.empty(shape, dtype=value_dtype, device=self._scratch.device)
        replace(value=value, velocity=None, age=None, known=False)

    def write(self, layer: int, out: torch.Tensor) -> None:
        """Write everybody's values of this step, whose payloads have been applied, to `out`, [N, 2, B, S, C]."""
        value = self.predictor.value[layer]
        if self.predictor.can_fuse:
            self._transform.write_others(layer, value, None, None, None, out)
        else:
            self._transform.write(layer, value, out)
