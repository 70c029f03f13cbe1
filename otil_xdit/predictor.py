"""The shared predictor: what every rank believes the keys and values of all patches to be, and how they move.

Sender and receivers keep the same copy and carry it forward by the same rule, from the same payloads: what differs from
rank to rank (a rank's own fresh values) never enters it. Bit for bit the same, because everything but one number is
done element by element, and that number, the gain, is measured by the sender and travels in its payload.

Shapes: N patches, B batch, S tokens of one patch, C features (heads x head dimension), m tokens that a rank sends.
Everything is computed in float32, whatever the copies are stored in.
"""

from __future__ import annotations

import torch

from otil_xdit.config import OtilConfig

_MAX_GAIN = 1.25
"""Beyond it an extrapolation does more harm by its noise than good, even where a rank's own values moved faster."""


class Predictor:
    """Value and velocity of the keys and values of all patches, for one layer.

    With value v, velocity u and the gain g of a patch, the prediction for a step is ``p = v + g u``. A payload brings
    fresh - p, or what a codec leaves of it, q; then ``v' = p + q`` and ``u' = g u + q / age`` where it brought
    something, age being the steps since it last did, and ``v' = p``, ``u' = damping g u`` elsewhere.

    The gain is 0 (``predict="none"``), a constant (``"constant"``), or measured (``"measured"``): the least-squares
    fit of a rank's own change since the last step by its own velocity. It follows schedulers whose steps differ in
    size. A receiver, who does not know the others' gain of this step yet, uses its own.

    Args:
        like: this rank's keys and values, [2, B, S, C]; gives shape, dtype and device.
        ranks, rank: number of patches, and this rank's.
        config: reads `predict`, `gain`, `damping`, `copies` and `ratio`.
    """

    def __init__(self, like: torch.Tensor, ranks: int, rank: int, config: OtilConfig) -> None:
        _, batch, tokens, width = like.shape
        value_dtype, velocity_dtype = storage_dtypes(config.copies, like.dtype)
        shape = (2, batch, ranks, tokens, width)
        self._rank = rank
        self._rule, self._constant, self._damping = config.predict, config.gain, config.damping
        self._known = False
        self.value = torch.zeros(shape, dtype=value_dtype, device=like.device)
        self.velocity: torch.Tensor | None = None
        self._age: torch.Tensor | None = None
        if config.predict != "none":
            self.velocity = torch.zeros(shape, dtype=velocity_dtype, device=like.device)
            if config.ratio < 1:
                self._age = torch.ones(ranks * tokens, device=like.device)

    @property
    def nbytes(self) -> int:
        """Bytes that the copies take."""
        kept = (self.value, self.velocity, self._age)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that must be equal on all ranks."""
        return [tensor for tensor in (self.value, self.velocity, self._age) if tensor is not None]

    def reset(self) -> None:
        """Forget what is known; the next thing must be `learn`."""
        self._known = False

    def known(self, own: bool = False) -> torch.Tensor:
        """Everybody's values of the step before, float32 [2, B, N, S, C], or this rank's, [2, B, S, C]; 0 at first."""
        value = self.value[:, :, self._rank] if own else self.value
        return value.float() if self._known else torch.zeros_like(value, dtype=torch.float32)

    def learn(self, values: torch.Tensor) -> None:
        """Take everybody's values, [2, B, N, S, C], of a synchronous step, the same on every rank."""
        if self.velocity is not None:
            if self._known:
                velocity = self.velocity.float()
                error = values.float() - self.value.float() - velocity
                self.velocity.copy_(velocity.add_(error if self._age is None else error / self._age_of_tokens()))
            else:
                self.velocity.zero_()
            if self._age is not None:
                self._age.fill_(1)
        self.value.copy_(values)
        self._known = True

    def gain(self, fresh: torch.Tensor) -> torch.Tensor:
        """How far this rank's own values have moved since the last step, in velocities.

        Args:
            fresh: this rank's, [2, B, S, C].

        Returns:
            float32 [2], one for keys and one for values, in [0, 1.25].
        """
        if self.velocity is None:
            return torch.zeros(2, device=fresh.device)
        if self._rule == "constant":
            return torch.full((2,), self._constant, device=fresh.device)
        velocity = self.velocity[:, :, self._rank].float()
        change = fresh.float() - self.value[:, :, self._rank].float()
        along = (change * velocity).sum(dim=(1, 2, 3))
        return (along / velocity.square().sum(dim=(1, 2, 3)).clamp_min(1e-30)).clamp_(0, _MAX_GAIN)

    def predict(self, gain: torch.Tensor, out: torch.Tensor) -> None:
        """Write the prediction of everybody's values for this step, [2, B, N, S, C], to `out`; `gain` is [2]."""
        if self.velocity is None:
            out.copy_(self.value)
        else:
            out.copy_(torch.addcmul(self.value.float(), self.velocity.float(), gain.view(2, 1, 1, 1, 1)))

    def own(self, gain: torch.Tensor) -> torch.Tensor:
        """What the others take this rank's values to be once they know its gain, float32 [2, B, S, C]."""
        value = self.value[:, :, self._rank].float()
        if self.velocity is None:
            return value
        return torch.addcmul(value, self.velocity[:, :, self._rank].float(), gain.view(2, 1, 1, 1))

    def update(self, gains: torch.Tensor, received: torch.Tensor, tokens: torch.Tensor | None, residuals: bool) -> None:
        """Carry the copy one step forward with everybody's payloads.

        Args:
            gains: every sender's, float32 [N, 2].
            received: [2, B, N, m, C]; residuals, or the values themselves.
            tokens: int64 [N, m], which of the N * S tokens they belong to, a token twice at most with equal values;
                None where m = S and everything was sent.
            residuals: what `received` holds.
        """
        value, velocity = self.value.float(), None
        if self.velocity is not None:
            velocity = self.velocity.float() * gains.T.reshape(2, 1, -1, 1, 1)
            value = value + velocity
        if tokens is None:
            news = value + received if residuals else received.float()
            velocity = None if velocity is None else velocity + (news - value)
            value = news
        else:
            self._update_some(value, velocity, received.flatten(2, 3), tokens.flatten(), residuals)
        self.value.copy_(value)
        if self.velocity is not None and velocity is not None:
            self.velocity.copy_(velocity)

    def _update_some(
        self,
        value: torch.Tensor,
        velocity: torch.Tensor | None,
        received: torch.Tensor,
        at: torch.Tensor,
        residuals: bool,
    ) -> None:
        """Change value and velocity, [2, B, N, S, C], in place; received is [2, B, N * m, C], `at` is [N * m]."""
        values = value.view(*value.shape[:2], -1, value.shape[-1])
        predicted = values.index_select(2, at)
        news = predicted + received if residuals else received.float()
        values.index_copy_(2, at, news)
        if velocity is None:
            return
        assert self._age is not None, "ages are kept where only some tokens are sent"
        velocities = velocity.view(values.shape)
        moved = velocities.index_select(2, at) + (news - predicted) / self._age[at, None]
        velocities.mul_(self._damping).index_copy_(2, at, moved)
        self._age.add_(1).index_fill_(0, at, 1)

    def _age_of_tokens(self) -> torch.Tensor:
        assert self._age is not None
        return self._age.view(self.value.shape[2], self.value.shape[3], 1)


def storage_dtypes(copies: str, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """What values and velocities are stored in: ``full`` as the layer's own, ``half`` bfloat16, ``small`` bfloat16
    values and velocities of 8 bits (float8_e5m2, whose range needs no scale)."""
    if copies == "full":
        return dtype, dtype
    return torch.bfloat16, torch.float8_e5m2 if copies == "small" else torch.bfloat16
