"""The copies of a group's keys and values, which all ranks share, and what they lack of this rank's.

Shapes: L layers, l of them in a run; N patches, B batch, S tokens of one patch, C features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from otil_xdit.exchange.kv_transform import KVTransform
from otil_xdit.method.codecs import CODECS
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.kernels.tiles import ChangeSums, Tiles
from otil_xdit.method.predictor import Predictor, storage_dtypes
from otil_xdit.method.scratch import ScratchBuffers


class KVCopies:
    """What all ranks know of everybody's keys and values of a group's layers, in the layers' coordinates.

    Attributes:
        gains: that the others are told to predict this rank's values of this step with, float32 [L, 2].
        fitted: that fit this step best, float32 [L, 2]: those of the next step, and what is predicted with meanwhile.

    Args:
        transform: has this rank's fresh values, and the layers' shape.
        config: the settings.
        scratch: for intermediate tensors and for results.
    """

    def __init__(self, transform: KVTransform, config: OtilConfig, scratch: ScratchBuffers) -> None:
        self._transform, self._config, self._scratch = transform, config, scratch
        self._first: dict[int, torch.Tensor] = {}
        self._predictor: Predictor | None = None
        self._sums: ChangeSums | None = None
        self._is_fitted: list[bool] = []

    def allocate(self, layers: int) -> None:
        """Make the buffers of L layers; what the first step has brought is kept."""
        transform = self._transform
        like = torch.empty((), dtype=transform.dtype, device=self._scratch.device).expand(layers, *transform.shape)
        self._predictor = Predictor(like, transform.ranks, transform.rank, self._config, self._scratch)
        for layer, values in self._first.items():
            self._predictor.set_values(layer, values)
        self._first.clear()
        self.gains = torch.full((layers, 2), self._predictor.constant_gain, device=self._scratch.device)
        self.fitted = self.gains.clone()
        self._is_fitted = [not self._predictor.is_fitted] * layers
        if self._predictor.can_fuse and self._compares:
            _, batch, tokens, _ = transform.shape
            self._sums = ChangeSums.make(layers, batch, tokens, self._scratch.device)

    def begin(self) -> None:
        """Start a generation: nothing is known."""
        if self._predictor is not None:
            self._predictor.reset()
            self._is_fitted = [not self._predictor.is_fitted] * len(self._is_fitted)

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
        sums = 0 if self._sums is None else self._sums.nbytes
        return sum(tensor.nbytes for tensor in (*self._predictor.tensors, self.gains, self.fitted)) + sums

    @property
    def _compares(self) -> bool:
        """Tell whether it matters how far this rank's values are from their copies."""
        config = self._config
        by_copies = config.select == "kv-l2" and config.score_reference == "prediction"
        return config.extrapolation == "fitted" or (config.ratio < 1 and by_copies)

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

    def take_own(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        differs: bool,
        following: dict[str, Any],
        agree: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Take what this rank's layer is called with, and find what the others' prediction of it lacks.

        `gains` become what that prediction is made with; of a layer that none was fitted for, this step's.

        Args:
            layer: its place.
            key, value: [B, H, S, D].
            out: [N, 2, B, S, C], a view of a contiguous [2, B, N, S, C]; its part of this rank may become them.
            differs: whether kernels are to code what their prediction lacks, and not the values.
            following: of `ArrivedPayloads.follow_own`; only where kernels code that.
            agree: makes of the first gains, float32 [2], those that are taken.
        """
        predictor, transform = self.predictor, self._transform
        if not predictor.can_fuse:
            transform.set_own(layer, key, value)
            self._compare_by_eager(layer, transform.code_own(layer), agree)
            return
        called_with = key, value
        if not self._is_fitted[layer]:
            self.fitted[layer].zero_()
            self._take_by_kernel(layer, called_with, None, differs, following)
            run, following = slice(layer, layer + 1), {}
            self._settled(run, None, self.fitted[run], self.gains.new_empty(1, 0), 0, None)
            self._begin_with(layer, agree(self.fitted[layer]))
        self._take_by_kernel(layer, called_with, out[transform.rank], differs, following)

    def _take_by_kernel(
        self,
        layer: int,
        called_with: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor | None,
        differs: bool,
        following: dict[str, Any],
    ) -> None:
        predictor, sums = self.predictor, self._sums
        compared: dict[str, Any] = {}
        if sums is not None or differs:
            compared["copies"], compared["velocities"] = predictor.own_copies(layer)
            compared["before"], compared["gains"] = self.fitted[layer], self.gains[layer]
        if sums is not None:
            compared["sums"], compared["totals"] = sums.tokens[layer], sums.totals[layer]
        if differs and self._measures_features:
            compared["sizes"] = self.tile_sizes(slice(layer, layer + 1))[0]
        self._transform.take_own(layer, called_with, out, differs, **compared, **following)

    def _begin_with(self, layer: int, gains: torch.Tensor) -> None:
        self.fitted[layer].copy_(gains)
        self._is_fitted[layer] = True

    def _compare_by_eager(self, layer: int, fresh: torch.Tensor, agree: Callable[[torch.Tensor], torch.Tensor]) -> None:
        predictor, run = self.predictor, slice(layer, layer + 1)
        if not predictor.is_fitted:
            return
        residual = self._residual_buffer(run)
        if not self._is_fitted[layer]:
            at_rest = torch.zeros_like(self.gains[run])
            predictor.residual_of(run, fresh[None], at_rest, residual)
            self._begin_with(layer, agree(predictor.fitted_gain(layer, residual[0], at_rest[0])))
        self.gains[layer].copy_(self.fitted[layer])
        predictor.residual_of(run, fresh[None], self.gains[run], residual)
        self.fitted[layer].copy_(predictor.fitted_gain(layer, residual[0], self.gains[layer]))

    def residual(self, run: slice) -> torch.Tensor:
        """Return what the others' prediction of this rank's values lacks, float32 [l, 2, B, S, C], in scratch.

        By eager code, of layers that were taken as values.
        """
        found = self._residual_buffer(run)
        if self.predictor.can_fuse or not self.predictor.is_fitted:
            self.predictor.residual_of(run, self._transform.coded_own(run), self.gains[run], found)
        return found

    def _residual_buffer(self, run: slice) -> torch.Tensor:
        return self._scratch("residual.own", (len(self._is_fitted), *self._transform.shape), torch.float32)[run]

    def tile_sizes(self, run: slice) -> torch.Tensor:
        """Return what `take_own` has found by kernels of the features of a run of layers, in scratch.

        Sums of the squares of residuals over each tile's tokens, float32 [l, tiles, 2 * B, C].
        """
        _, batch, tokens, width = self._transform.shape
        tiles = Tiles.of(batch, tokens)
        shape = len(self._is_fitted), tiles.tiles, tiles.images, width
        return self._scratch("sizes of features", shape, torch.float32)[run]

    @property
    def _measures_features(self) -> bool:
        return CODECS[self._config.codec](self._transform.dtype).by_feature

    def settle(
        self, run: slice, table: torch.Tensor, count: int | None, agreed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the next step's gains, where they are fitted, and what is predicted worst, from what kernels have taken.

        Args:
            run: layers.
            table: int64 [K, T], the tokens of each sub-block.
            count: how many sub-blocks are selected, the worst ones; None where none are compared.
            agreed: what several ranks have found of the one layer that the run is, [R, ...], as of `measure`; the means
                count then.

        Returns:
            Squared residuals of sub-blocks, float32 [l, K], and those selected, int64 [l, k].
        """
        gains = self.fitted[run]
        scores = gains.new_empty(len(gains), 0 if count is None else len(table))
        return scores, self._settled(run, table, gains, scores, count or 0, agreed)

    def measure(self, run: slice, table: torch.Tensor, scored: bool) -> torch.Tensor:
        """Return the gains that `settle` would find of one layer and, if wanted, the residuals, float32 [1, 2 + K]."""
        found = self.gains.new_empty(1, 2 + scored * len(table))
        self._settled(run, table, found[:, :2], found[:, 2:], 0, None)
        return found

    def _settled(
        self,
        run: slice,
        table: torch.Tensor | None,
        fitted: torch.Tensor,
        scores: torch.Tensor,
        count: int,
        agreed: torch.Tensor | None,
    ) -> torch.Tensor:
        from otil_xdit.method.kernels.choices import settle

        predictor, sums = self.predictor, self._sums
        if sums is None or not (predictor.is_fitted or scores.numel() or agreed is not None):
            return torch.empty(len(fitted), 0, dtype=torch.int64, device=fitted.device)
        given = sums.tokens[run], sums.totals[run], self.gains[run], fitted, scores, table
        return settle(*given, predictor.is_fitted, count, agreed)

    def write(self, layer: int, out: torch.Tensor) -> None:
        """Write everybody's values of this step, whose payloads have been applied, to `out`, [N, 2, B, S, C]."""
        value = self.predictor.value[layer]
        if self.predictor.can_fuse:
            self._transform.write_others(layer, value, None, None, None, out)
        else:
            self._transform.write(layer, value, out)

    def extrapolating(self, layer: int) -> dict[str, Any]:
        """Return what kernels need that extrapolate a layer's copies for attention: what the gain is fitted by."""
        fits = self._sums is not None and self.predictor.is_fitted
        totals = self._sums.totals[layer] if self._sums is not None and fits else None
        predicts = self.predictor.velocity is not None
        return {"totals": totals, "gains": self.gains[layer] if predicts else None}

    def write_predicted(self, layer: int, out: torch.Tensor) -> None:
        """Write the prediction of everybody's values of this step to `out`; this rank's are the fresh ones.

        Args:
            layer: of the L.
            out: [N, 2, B, S, C], a view of a contiguous [2, B, N, S, C].
        """
        predictor, transform = self.predictor, self._transform
        if predictor.can_fuse:
            velocity = None if predictor.velocity is None else predictor.velocity[layer]
            transform.write_others(layer, predictor.value[layer], velocity, **self.extrapolating(layer), out=out)
        elif transform.is_identity:
            predictor.predict(layer, self.fitted[layer], out)
            out[transform.rank] = transform.own_values(layer)
        else:
            predicted = transform.coded_buffer()
            predictor.predict(layer, self.fitted[layer], predicted)
            transform.write(layer, predicted, out)
