"""The shared predictor: each rank's copy of the keys and values of all patches, extrapolated from step to step.

All ranks hold bit-identical copies, because each update uses only data that every rank has received, element by
element. The one measured quantity, the gain, is computed by the sender and shipped in the payload.

Over 300 lines: nearly all of it is one class, which says why.

Shapes: L layers, l of them in a run; N patches, B batch, S tokens of one patch, C features (heads x head dimension),
m tokens that a rank sends. Everything is computed in float32, whatever dtype the copies are stored in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from otil_xdit.method.config import OtilConfig
from otil_xdit.method.kernels import is_fused
from otil_xdit.method.scratch import ScratchBuffers

MOST_GAIN = 1.25
"""Bound on the fitted gain: beyond it the velocity's noise costs more than the extrapolation wins."""


class Predictor:
    """Value and velocity of the keys and values of all patches, for layers of equal shape.

    Over 200 lines: value, velocity and age move together, and every method here reads or writes all three.

    With value v, velocity u and gain g of a patch, the prediction for a step is ``p = v + g u``. A payload carries q,
    the residual fresh - p as its codec rounds it. Where a token was sent, ``v' = p + q`` and ``u' = g u + q / age``,
    age being the number of steps since it was last sent. Elsewhere ``v' = p`` and ``u' = velocity_damping g u``, with
    another gain.

    The gain is 0 (``extrapolation="none"``), a constant (``"constant"``), or fitted (``"fitted"``): the least-squares
    fit of a rank's own change since the last step by its own velocity. So it follows schedulers whose steps differ in
    size. A payload is coded with the gain that is expected (`otil_xdit.method.gain_trend`): so one pass over the values
    gives their residuals, and what fits this step. It carries both gains: tokens that were not sent move by the latter,
    and so does what attention takes of the others where no payload is waited for.

    Args:
        like: one rank's keys and values of all layers, [L, 2, B, S, C]; gives shape, dtype and device.
        ranks, rank: number of patches, and this rank's.
        config: reads `extrapolation`, `extrapolation_gain`, `velocity_damping`, `kv_cache_dtype` and `ratio`.
        scratch: buffers for intermediate results.
    """

    def __init__(self, like: torch.Tensor, ranks: int, rank: int, config: OtilConfig, scratch: ScratchBuffers) -> None:
        layers, _, batch, tokens, width = like.shape
        value_dtype, velocity_dtype = storage_dtypes(config.kv_cache_dtype, like.dtype)
        shape = (layers, ranks, 2, batch, tokens, width)
        self._rank, self._scratch = rank, scratch
        self._rule, self._constant = config.extrapolation, config.extrapolation_gain
        self._damping = config.velocity_damping
        self._known = [False] * layers
        self.value = torch.zeros(shape, dtype=value_dtype, device=like.device)
        self.velocity: torch.Tensor | None = None
        self._age: torch.Tensor | None = None
        if config.extrapolation != "none":
            self.velocity = torch.zeros(shape, dtype=velocity_dtype, device=like.device)
            if config.ratio < 1:
                self._age = torch.ones(layers, ranks, tokens, device=like.device)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All state, which must be bit-identical on all ranks; the first dimension of each is L."""
        return [tensor for tensor in (self.value, self.velocity, self._age) if tensor is not None]

    @property
    def is_fitted(self) -> bool:
        """Tell whether gains are fitted to what a rank's own values did."""
        return self._rule == "fitted"

    @property
    def constant_gain(self) -> float:
        """Return the gain where it is not fitted."""
        return self._constant if self._rule == "constant" else 0.0

    @property
    def can_fuse(self) -> bool:
        """Tell whether kernels read and write these copies."""
        return is_fused(self.value)

    def reset(self) -> None:
        """Start a generation: mark all values as unknown. Each layer needs `set_values` before it is predicted."""
        self._known = [False] * len(self._known)

    def is_known(self, layer: int) -> bool:
        """Tell whether a layer's values have been set in this generation."""
        return self._known[layer]

    def last_values(self, layer: int) -> torch.Tensor:
        """Return all ranks' values of a layer at the step before, float32 [N, 2, B, S, C], in scratch; 0 at first."""
        value = self.value[layer]
        known = self._scratch("known", tuple(value.shape), torch.float32)
        return known.copy_(value) if self._known[layer] else known.zero_()

    def set_values(self, layer: int, values: torch.Tensor) -> None:
        """Replace all ranks' values of a layer, [N, 2, B, S, C], after a synchronous step; the velocity follows."""
        value = self.value[layer]
        if self.velocity is not None:
            velocity, age = self.velocity[layer], None if self._age is None else self._age[layer]
            if self._known[layer]:
                before = self._in_float32("velocity", velocity)
                faster = self._scratch("moved", tuple(value.shape), torch.float32).copy_(values).sub_(value)
                faster.sub_(before).div_(1 if age is None else age[:, None, None, :, None])
                self._keep_velocity(velocity, faster.add_(before))
            else:
                velocity.zero_()
        value.copy_(values)
        self._note(layer)

    def set_by_kernel(self, layer: int, replace: Callable[..., None]) -> None:
        """Do what `set_values` does, by a kernel that replaces values and velocities, given ages and what is known."""
        age, known = None if self._age is None else self._age[layer], self._known[layer]
        velocity = None if self.velocity is None else self.velocity[layer]
        replace(value=self.value[layer], velocity=velocity, age=age if known else None, known=known)
        self._note(layer)

    def _note(self, layer: int) -> None:
        """Take note that a layer's values are those of this step."""
        if self._age is not None:
            self._age[layer].fill_(1)
        self._known[layer] = True

    def fitted_gain(self, layer: int, residual: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """Return how far this rank's own values have moved since the last step, in velocities.

        Args:
            layer: of the L.
            residual: what a prediction of this rank's keys and values lacks, float32 [2, B, S, C].
            gain: of that prediction, float32 [2].

        Returns:
            float32 [2], one for keys and one for values, in [0, 1.25].
        """
        if self.velocity is None or not self.is_fitted:
            return torch.full((2,), self.constant_gain, device=residual.device)
        velocity = self._in_float32("velocity", self.velocity[layer, self._rank])
        along = torch.mul(residual, velocity, out=self._scratch("change", tuple(residual.shape), torch.float32))
        square = torch.linalg.vector_norm(velocity, dim=(1, 2, 3)).square_()
        return along.sum(dim=(1, 2, 3)).div_(square.clamp_min_(1e-30)).add_(gain).clamp_(0, MOST_GAIN)

    def predict_others(self, layer: int, gain: torch.Tensor, out: torch.Tensor) -> None:
        """Write the prediction of the other ranks' values for this step to `out`, [N, 2, B, S, C].

        Args:
            layer: of the L.
            gain: float32 [2].
            out: of which this rank's part is left as it is.
        """
        for others in other_ranks(self._rank, len(out)):
            velocity = None if self.velocity is None else self.velocity[layer, others]
            self._moved(self.value[layer, others], velocity, gain.view(2, 1, 1, 1), out[others])

    def residual_of(self, run: slice, fresh: torch.Tensor, gains: torch.Tensor, out: torch.Tensor) -> None:
        """Write what the prediction lacks that the other ranks make of this rank's values, fresh - p.

        Args:
            run: layers.
            fresh: this rank's keys and values, [l, 2, B, S, C].
            gains: float32 [l, 2].
            out: float32 [l, 2, B, S, C].
        """
        self.predict_own(run, gains, out)
        torch.sub(fresh, out, out=out)

    def predict_own(self, run: slice, gains: torch.Tensor, out: torch.Tensor) -> None:
        """Write the prediction that the other ranks make of this rank's values once they have its gains.

        Args:
            run: layers.
            gains: float32 [l, 2].
            out: float32 [l, 2, B, S, C].
        """
        velocity = None if self.velocity is None else self.velocity[run, self._rank]
        self._moved(self.value[run, self._rank], velocity, gains.view(*gains.shape, 1, 1, 1), out)

    def own_copies(self, run: slice | int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return this rank's values and velocities of some layers, each [l, 2, B, S, C], or of one; views."""
        return self.value[run, self._rank], None if self.velocity is None else self.velocity[run, self._rank]

    def apply_residuals(
        self,
        run: slice,
        gains: torch.Tensor,
        levels: torch.Tensor,
        scales: torch.Tensor | None,
        sent: torch.Tensor | None,
    ) -> None:
        """Advance the copies of some layers by one step, with the residuals that all ranks sent.

        Args:
            run: layers.
            gains: of the senders, float32 [l, N, 2, 2]: of keys and values of tokens that were sent, and of others.
            levels, scales: float32 [l, N, 2, B, S, C] and [l, N, 2, B, S, 1], whose product is the residuals,
                0 where nothing was sent; without scales the levels are.
            sent: float32 [l, N, S], 1 for tokens that were sent and 0 for others; None where all were.
        """
        value, velocity = self._floats(run)
        moved = self._by_token(gains, sent)
        if velocity is not None:
            value.addcmul_(velocity, moved)
        scales = levels.new_ones(1) if scales is None else scales
        value.addcmul_(levels, scales)
        if velocity is not None:
            kept, share = self._kept(run, sent)
            velocity.mul_(moved * kept).addcmul_(levels, scales * share)
        self._store(run, value, velocity)

    def apply_coded(self, run: slice, correct: Callable[..., None]) -> None:
        """Advance the copies of some layers by one step by a kernel that reads the payloads itself.

        Args:
            run: layers.
            correct: given the run's values, velocities and ages, and how these are used; advances them.
        """
        self.advance(run, partial(correct, age=self.ages(run)))

    def ages(self, run: slice) -> torch.Tensor | None:
        """Return how many steps ago tokens were sent last, float32 [l, N, S]; None where all always are."""
        return None if self._age is None else self._age[run]

    def advance(self, run: slice, correct: Callable[..., None]) -> None:
        """Do what `apply_coded` does, but for the ages."""
        velocity = None if self.velocity is None else self.velocity[run]
        correct(value=self.value[run], velocity=velocity, **self.formula)

    @property
    def formula(self) -> dict[str, Any]:
        """Return the constants by which copies are advanced."""
        return {"fitted": self.is_fitted, "constant": self.constant_gain, "damping": self._damping}

    def apply_values(
        self,
        run: slice,
        gains: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor | None,
        sent: torch.Tensor | None,
    ) -> None:
        """Advance the copies of some layers by one step, with the values that all ranks sent.

        Args:
            run, gains, sent: as in `apply_residuals`.
            values: float [l, N, 2, B, m, C].
            rows: int64 [l * N * 2 * B * m], the row of each among all l * N * 2 * B * S; one that is named twice gets
                equal values. None where m = S.
        """
        if self.velocity is None:
            self._put(self.value[run], values, rows)
            return
        value, velocity = self._floats(run)
        assert velocity is not None, "see above"
        moved = self._by_token(gains, sent)
        value.addcmul_(velocity, moved)
        change = self._scratch("change", tuple(value.shape), torch.float32).copy_(value).neg_()
        self._put(value, values, rows)
        kept, share = self._kept(run, sent)
        velocity.mul_(moved * kept).addcmul_(change.add_(value), share)
        self._store(run, value, velocity)

    def _by_token(self, gains: torch.Tensor, sent: torch.Tensor | None) -> torch.Tensor:
        """Return each token's gain, float32 [l, N, 2, 1, S, 1], or [l, N, 2, 1, 1, 1] where all tokens were sent."""
        of_sent, of_others = (one[..., None, None, None] for one in gains.unbind(2))
        if sent is None:
            return of_sent
        out = self._scratch("gains", (*sent.shape[:2], 2, 1, sent.shape[2], 1), torch.float32)
        return torch.lerp(of_others, of_sent, sent[:, :, None, None, :, None], out=out)

    def _put(self, value: torch.Tensor, values: torch.Tensor, rows: torch.Tensor | None) -> None:
        if rows is None:
            value.copy_(values)
        else:
            copied = self._scratch("put", tuple(values.shape), value.dtype).copy_(values)
            value.view(-1, value.shape[-1]).index_copy_(0, rows, copied.view(-1, value.shape[-1]))

    def _moved(self, value: torch.Tensor, velocity: torch.Tensor | None, gain: torch.Tensor, out: torch.Tensor) -> None:
        """``out = value + gain * velocity``."""
        if velocity is None:
            out.copy_(value)
        elif value.dtype == velocity.dtype == out.dtype == torch.float32:
            torch.addcmul(value, velocity, gain, out=out)
        else:
            moved = self._scratch("moved", tuple(value.shape), torch.float32).copy_(velocity)
            out.copy_(moved.mul_(gain).add_(value))

    def _kept(self, run: slice, sent: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factor of the velocities and the share of a correction that they get; advance the ages.

        Returns:
            Both float32 [l, N, 1, 1, S, 1], or [1] where all tokens were sent.
        """
        if sent is None or self._age is None:
            one = self.value.new_ones(1, dtype=torch.float32)
            return one, one
        age = self._age[run]
        kept, share = (sent * (1 - self._damping)).add_(self._damping), age.reciprocal()
        age.mul_(1 - sent).add_(1)
        of_numbers = (*age.shape[:2], 1, 1, age.shape[2], 1)
        return kept.view(of_numbers), share.view(of_numbers)

    def _floats(self, run: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return value and velocity of a run of layers in float32: the state itself, or else copies in scratch."""
        velocity = None if self.velocity is None else self._in_float32("velocity", self.velocity[run])
        return self._in_float32("value", self.value[run]), velocity

    def _in_float32(self, name: str, kept: torch.Tensor) -> torch.Tensor:
        """Return `kept` where it is float32, else a copy of it in scratch."""
        if kept.dtype == torch.float32:
            return kept
        return self._scratch(name, tuple(kept.shape), torch.float32).copy_(kept)

    def _store(self, run: slice, value: torch.Tensor, velocity: torch.Tensor | None) -> None:
        """Write back what `_floats` returned."""
        if self.value.dtype != torch.float32:
            self.value[run].copy_(value)
        if self.velocity is not None and velocity is not None and self.velocity.dtype != torch.float32:
            self._keep_velocity(self.velocity[run], velocity)

    @staticmethod
    def _keep_velocity(kept: torch.Tensor, velocity: torch.Tensor) -> None:
        """Round velocities, float32, to what they are kept as; may overwrite them."""
        if kept.dtype.itemsize == 1:
            largest = torch.finfo(kept.dtype).max  # beyond it they would become infinite
            velocity = velocity.clamp_(-largest, largest)
        kept.copy_(velocity)


def other_ranks(rank: int, ranks: int) -> list[slice]:
    """Return the runs of all ranks but one: those before it and those after it, where there are any."""
    runs = slice(0, rank), slice(rank + 1, ranks)
    return [run for run in runs if run.start < run.stop]


def storage_dtypes(kv_cache_dtype: str, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes that values and velocities are stored in.

    Velocities of 8 bits are float8_e5m2, whose range needs no scale.

    Args:
        kv_cache_dtype: ``auto`` for values of the layer's own type, and velocities of 8 bits where that has 16, else of
            that type, too; ``same`` for both in the layer's own; ``bfloat16`` for both in that; ``float8`` for bfloat16
            values and velocities of 8 bits.
        dtype: the layer's.
    """
    value = dtype if kv_cache_dtype in ("auto", "same") else torch.bfloat16
    is_short = kv_cache_dtype == "float8" or (kv_cache_dtype == "auto" and dtype.itemsize == 2)
    return value, torch.float8_e5m2 if is_short else value
