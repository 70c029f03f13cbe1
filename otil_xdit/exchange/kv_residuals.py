"""What the others' prediction of this rank's keys and values lacks, and what of that says how to go on.

Kernels find it in one pass over keys and values; the eager code is their reference.

Shapes: L layers, l of them in a run; N patches, B batch, S tokens of one patch, C features, K sub-blocks of T tokens, k
sent a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from otil_xdit.exchange.kv_copies import KVCopies
from otil_xdit.exchange.kv_transform import KVTransform
from otil_xdit.method.codecs import CODECS
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.gain_trend import SHARE, GainTrend, add, follow
from otil_xdit.method.kernels.tiles import ChangeSums, Tiles
from otil_xdit.method.scratch import ScratchBuffers


class KVResiduals:
    """Compares what this rank's layers are called with with the prediction that all ranks make of it.

    Over 200 lines: kernels and eager code find the same, and share the gains that they find.

    Attributes:
        gains: that the others are told to predict what is sent of this rank's values of this step with, float32 [L, 2].
        fitted: that fit this step best, float32 [L, 2]; what is not sent is predicted with these, and what is waited
            for no payload.
        expected: of the next step, float32 [L, 2], as far as this one tells.

    Args:
        transform: has this rank's fresh values, and the layers' shape.
        copies: of all ranks' values.
        config: the settings.
        scratch: for intermediate tensors and for results.
        trend: of the gains of all layers, at steps that wait.
    """

    def __init__(
        self,
        transform: KVTransform,
        copies: KVCopies,
        config: OtilConfig,
        scratch: ScratchBuffers,
        trend: GainTrend,
    ) -> None:
        self._transform, self._copies, self._scratch, self._trend = transform, copies, scratch, trend
        by_copies = config.select == "kv-l2" and config.score_reference == "prediction"
        self._matter = config.extrapolation == "fitted" or (config.ratio < 1 and by_copies)
        self._by_feature = CODECS[config.codec](transform.dtype).by_feature
        self._is_fitted: list[bool] = []
        self._sums: ChangeSums | None = None

    def allocate(self, layers: int) -> None:
        """Make the buffers of L layers, of which there are copies."""
        predictor = self._copies.predictor
        self.gains = torch.full((layers, 2), predictor.constant_gain, device=self._scratch.device)
        self.fitted, self.expected = self.gains.clone(), self.gains.clone()
        if predictor.is_fitted:
            self._trend.allocate(self._scratch.device)
        self._is_fitted = [not predictor.is_fitted] * layers
        if predictor.can_fuse and self._matter:
            _, batch, tokens, _ = self._transform.shape
            self._sums = ChangeSums.make(layers, batch, tokens, self._scratch.device)

    def begin(self) -> None:
        """Start a generation: no gain is known."""
        if self._is_fitted:
            self._is_fitted = [not self._copies.predictor.is_fitted] * len(self._is_fitted)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device."""
        sums = 0 if self._sums is None else self._sums.nbytes
        return self.gains.nbytes + self.fitted.nbytes + self.expected.nbytes + sums if self._is_fitted else 0

    def take_own(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        differs: bool,
        following: dict[str, Any],
        agree: Callable[[torch.Tensor], torch.Tensor],
        awaited_at: int | None,
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
            awaited_at: the step, if everybody waits for the layer's payload at it: then its gains follow the trend, but
                for the first ones, which are of this step.
        """
        transform, predictor, trend = self._transform, self._copies.predictor, None
        if awaited_at is not None and predictor.is_fitted:
            trend = self._trend.at(awaited_at)
        if not predictor.can_fuse:
            transform.set_own(layer, key, value)
            self._compare_by_eager(layer, transform.code_own(layer), agree, trend)
            return
        called_with = key, value
        if not self._is_fitted[layer]:
            self.expected[layer].zero_()
            self._take_by_kernel(layer, called_with, None, differs, following, None)
            run, following = slice(layer, layer + 1), {}
            self._settled(run, None, self.gains.new_empty(1, 0), 0, None)
            self._begin_with(layer, agree(self.fitted[layer]))
            trend = None
        self._take_by_kernel(layer, called_with, out[transform.rank], differs, following, trend)

    def _take_by_kernel(
        self,
        layer: int,
        called_with: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor | None,
        differs: bool,
        following: dict[str, Any],
        trend: torch.Tensor | None,
    ) -> None:
        compared: dict[str, Any] = {}
        if self._sums is not None or differs:
            compared["copies"], compared["velocities"] = self._copies.predictor.own_copies(layer)
            compared["expected"], compared["gains"], compared["trend"] = self.expected[layer], self.gains[layer], trend
            compared["fitted"] = self._copies.predictor.is_fitted
        if self._sums is not None:
            compared["sums"], compared["totals"] = self._sums.tokens[layer], self._sums.totals[layer]
        if differs and self._by_feature:
            compared["sizes"] = self.tile_sizes(slice(layer, layer + 1))[0]
        self._transform.take_own(layer, called_with, out, differs, **(compared | following))

    def _compare_by_eager(
        self,
        layer: int,
        fresh: torch.Tensor,
        agree: Callable[[torch.Tensor], torch.Tensor],
        trend: torch.Tensor | None,
    ) -> None:
        predictor, run = self._copies.predictor, slice(layer, layer + 1)
        if not predictor.is_fitted:
            return
        residual, gains, expected = self._buffer(run), self.gains[layer], self.expected[layer]
        told = expected
        if not self._is_fitted[layer]:
            predictor.residual_of(run, fresh[None], self.gains[run].zero_(), residual)
            self._begin_with(layer, agree(predictor.fitted_gain(layer, residual[0], gains)))
        elif trend is not None:
            told = follow(trend, expected)
        gains.copy_(told.half())  # as they travel
        predictor.residual_of(run, fresh[None], self.gains[run], residual)
        self.fitted[layer].copy_(predictor.fitted_gain(layer, residual[0], gains))
        if trend is not None:
            add(trend, self.fitted[layer], expected)
        torch.lerp(gains, self.fitted[layer], SHARE, out=expected)

    def _begin_with(self, layer: int, gains: torch.Tensor) -> None:
        self.expected[layer].copy_(gains)
        self._is_fitted[layer] = True

    def of(self, run: slice) -> torch.Tensor:
        """Return what the prediction of a run of layers lacks, float32 [l, 2, B, S, C], in scratch.

        By eager code, of layers that were taken as values.
        """
        found, predictor = self._buffer(run), self._copies.predictor
        if predictor.can_fuse or not predictor.is_fitted:
            predictor.residual_of(run, self._transform.coded_own(run), self.gains[run], found)
        return found

    def _buffer(self, run: slice) -> torch.Tensor:
        return self._scratch("residual.own", (len(self._is_fitted), *self._transform.shape), torch.float32)[run]

    def tile_sizes(self, run: slice) -> torch.Tensor:
        """Return what `take_own` has found by kernels of the features of a run of layers, in scratch.

        Sums of the squares of residuals over each tile's tokens, float32 [l, tiles, 2 * B, C].
        """
        _, batch, tokens, width = self._transform.shape
        tiles = Tiles.of(batch, tokens)
        shape = len(self._is_fitted), tiles.tiles, tiles.images, width
        return self._scratch("sizes of features", shape, torch.float32)[run]

    def settle(
        self, run: slice, table: torch.Tensor, count: int | None, is_awaited: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the next step's gains, where they are fitted, and what is predicted worst, from what kernels have taken.

        Args:
            run: layers.
            table: int64 [K, T], the tokens of each sub-block.
            count: how many sub-blocks are selected, the worst ones; None where none are compared.
            is_awaited: whether everybody waits for them at this step; then it is one layer.

        Returns:
            Squared residuals of sub-blocks, float32 [l, K], and those selected, int64 [l, k].
        """
        gains = self.fitted[run]
        scores = gains.new_empty(len(gains), 0 if count is None else len(table))
        trend = self._trend.sums if is_awaited and self._copies.predictor.is_fitted else None
        return scores, self._settled(run, table, scores, count or 0, trend)

    def _settled(
        self, run: slice, table: torch.Tensor | None, scores: torch.Tensor, count: int, trend: torch.Tensor | None
    ) -> torch.Tensor:
        from otil_xdit.method.kernels.choices import settle

        fits, sums, fitted = self._copies.predictor.is_fitted, self._sums, self.fitted[run]
        if sums is None or not (fits or scores.numel()):
            return torch.empty(len(fitted), 0, dtype=torch.int64, device=fitted.device)
        given = sums.tokens[run], sums.totals[run], self.gains[run], fitted, self.expected[run], scores, table
        return settle(*given, trend, fits, count)

    def extrapolating(self, layer: int) -> dict[str, Any]:
        """Return what kernels need that extrapolate a layer's copies for attention: what the gain is fitted by."""
        predictor = self._copies.predictor
        totals = self._sums.totals[layer] if self._sums is not None and predictor.is_fitted else None
        return {"totals": totals, "gains": None if predictor.velocity is None else self.gains[layer]}

    def write_predicted(self, layer: int, out: torch.Tensor) -> None:
        """Write the prediction of everybody's values of this step to `out`, as of `take_own`; this rank's are fresh."""
        predictor, transform = self._copies.predictor, self._transform
        if predictor.can_fuse:
            velocity = None if predictor.velocity is None else predictor.velocity[layer]
            transform.write_others(layer, predictor.value[layer], velocity, **self.extrapolating(layer), out=out)
        elif transform.is_identity:
            predictor.predict_others(layer, self.fitted[layer], out)
            out[transform.rank] = transform.own_values(layer)
        else:
            predicted = transform.coded_buffer()
            predictor.predict_others(layer, self.fitted[layer], predicted)
            transform.write(layer, predicted, out)
