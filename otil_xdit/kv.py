"""Keys and values of one attention layer across the patches: what a rank keeps, sends and gets.

Shapes: N patches, B batch, S tokens of one patch, C features (heads x head dimension), K sub-blocks of T tokens, k sent
a step, m = k * T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from otil_xdit.codec import make_codec
from otil_xdit.config import OtilConfig
from otil_xdit.exchange import Exchange, ExchangedLayer
from otil_xdit.predictor import Predictor
from otil_xdit.schedule import Mode
from otil_xdit.selection import blocks_to_send

_ALIGNMENT = 16
"""Bytes; what a codec writes starts at a multiple of it, so that it can be viewed in its own dtype."""

Pick = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From this rank's fresh keys and values and what to compare them with, [2, B, S, C]: sub-blocks to send, int64 [k]."""

Workspace = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor]
"""Room of a shape and dtype, under a name; layers share it, as each is done with it before the next begins."""


class KVLayer(ExchangedLayer[torch.Tensor]):
    """One rank's part in the exchange of an attention layer's keys and values.

    Buffers are allocated once and live as long as shapes and dtype stay the same; a generation's first steps are
    synchronous and overwrite them whole, so nothing of an earlier image is left.

    Args:
        exchange: carries the payloads.
        name: the layer's name in error messages.
        like: this rank's keys and values, [2, B, S, C]; gives shape, dtype and device.
        table: int64 [K, T], the tokens of each sub-block.
        config: the settings.
    """

    def __init__(
        self, exchange: Exchange, name: str, like: torch.Tensor, table: torch.Tensor, config: OtilConfig
    ) -> None:
        super().__init__()
        _, batch, tokens, width = like.shape
        group = exchange.group
        self.shape, self.dtype, self.table = like.shape, like.dtype, table
        self._exchange, self._name, self._config = exchange, name, config
        self._errors: torch.Tensor | None = None
        self._previous: torch.Tensor | None = None
        self._predictor: Predictor | None = None
        self._warmup_codec = make_codec(config.warmup_codec, like.dtype)
        if config.freshness == "sync":
            return
        self._predictor = Predictor(like, group.world_size, group.rank, config)
        self._codec = make_codec(config.codec, like.dtype)
        self.sends_all = config.ratio >= 1
        blocks, block_tokens = table.shape
        self._count = 0 if self.sends_all else blocks_to_send(blocks, config.ratio)
        self._sent_tokens = tokens if self.sends_all else self._count * block_tokens
        self._first_token = torch.arange(group.world_size, device=like.device)[:, None] * tokens
        if config.against == "previous" and config.select.startswith("kv") and not self.sends_all:
            self._previous = torch.empty_like(like)
        # A payload is [gains, error, indices, padding, coded tokens] in bytes: one collective carries it all.
        self._gains_end = 8 if config.predict == "measured" else 0
        self._errors_end = self._gains_end + (4 if config.tolerance else 0)
        self._indices_end = self._errors_end + 4 * self._count
        self._coded_start = -(-self._indices_end // _ALIGNMENT) * _ALIGNMENT
        self._vectors = 2 * batch * self._sent_tokens
        size = self._coded_start + self._codec.size(self._vectors, width)
        self._payload = torch.zeros(size, dtype=torch.uint8, device=like.device)
        self._received = self._payload.new_empty(group.world_size, size)

    @property
    def nbytes(self) -> int:
        """Bytes that this layer keeps on its device."""
        if self._predictor is None:
            return 0
        previous = 0 if self._previous is None else self._previous.nbytes
        return self._predictor.nbytes + self._payload.nbytes + self._received.nbytes + previous

    @property
    def shared_state(self) -> list[torch.Tensor]:
        """What must be the same on all ranks between two steps, bit for bit."""
        return [] if self._predictor is None else self._predictor.tensors

    @property
    def error(self) -> float:
        """The largest prediction error of any rank that is known so far, relative to its values: |fresh - p| / |fresh|.

        Only with a tolerance; waits for the device.
        """
        return float("inf") if self._errors is None else float(self._errors.max())

    def begin(self) -> None:
        """Start a generation."""
        self.visits = 0
        self._errors = None
        if self._predictor is not None:
            self._predictor.reset()

    def absorb(self) -> None:
        """Take in what the others sent a step ago, if anything is under way."""
        received = self.drain()
        if received is not None:
            self._update(received)

    def gather(
        self, fresh: torch.Tensor, mode: Mode, pick: Pick, workspace: Workspace, step: int, kind: str
    ) -> torch.Tensor:
        """Every patch's keys and values, as far as `mode` lets this rank know them.

        Args:
            fresh: this rank's keys and values of this step, [2, B, S, C], contiguous.
            mode: ``sync`` waits for everybody's of this step, exact but for the warm-up's codec; ``fresh`` waits for
                what is sent of them; ``displaced`` takes what was sent until the step before, predicted to this one,
                and sends for the next; ``frozen`` keeps what there is.
            pick: says what to send, in the modes ``fresh`` and ``displaced`` where not everything is sent.
            workspace: room for results.
            step: for error messages.
            kind: the counter that the bytes go to.

        Returns:
            [2, B, N * S, C] in a workspace: read it before the next call of any layer. This rank's part is fresh.
        """
        where = f"layer {self._name} at step {step}"
        self.absorb()
        ranks = self._exchange.group.world_size
        whole = workspace("whole", (2, *self.shape[1:2], ranks, *self.shape[2:]), self.dtype)
        if mode == "sync":
            self._gather_all(fresh, whole, workspace, kind, where)
        else:
            self._gather_some(fresh, mode, pick, whole, kind, where)
        if self._previous is not None:
            self._previous.copy_(fresh)
        self.visits += 1
        return whole.flatten(2, 3)

    def _gather_all(
        self, fresh: torch.Tensor, whole: torch.Tensor, workspace: Workspace, kind: str, where: str
    ) -> None:
        ranks, predictor = self._exchange.group.world_size, self._predictor
        codec = self._warmup_codec
        # A refresh is exact, whatever the warm-up sends.
        if predictor is None or not codec.of_residuals or self.visits >= self._config.warmup_steps:
            gathered = workspace("gathered", (ranks, *self.shape), self.dtype)
            everybody = self._exchange.all_gather(fresh, gathered, kind, where).wait()
            whole.copy_(everybody.permute(1, 2, 0, 3, 4))
        else:
            vectors, width = fresh[..., 0].numel(), self.shape[-1]
            payload = workspace("payload", (codec.size(vectors, width),), torch.uint8)
            received = workspace("received", (ranks, payload.numel()), torch.uint8)
            codec.encode((fresh - predictor.known(own=True)).reshape(vectors, width), payload)
            coded = self._exchange.all_gather(payload, received, kind, where).wait()
            changes = codec.decode(coded, vectors, width).unflatten(1, self.shape[:3]).permute(1, 2, 0, 3, 4)
            whole.copy_(changes.add_(predictor.known()))
        if predictor is not None:
            predictor.learn(whole)
        whole[:, :, self._exchange.group.rank] = fresh

    def _gather_some(
        self, fresh: torch.Tensor, mode: Mode, pick: Pick, whole: torch.Tensor, kind: str, where: str
    ) -> None:
        predictor = self._predictor
        assert predictor is not None, "a run whose every step is synchronous predicts nothing"
        gain = predictor.gain(fresh)
        if mode != "fresh":
            predictor.predict(gain, whole)
        if mode != "frozen":
            self._write(fresh, predictor.own(gain), gain, pick)
            self._pending = self._exchange.all_gather(self._payload, self._received, kind, where)
        if mode == "fresh":
            self.absorb()
            whole.copy_(predictor.value)
        whole[:, :, self._exchange.group.rank] = fresh

    def _write(self, fresh: torch.Tensor, prediction: torch.Tensor, gain: torch.Tensor, pick: Pick) -> None:
        """Fill the payload."""
        residual = fresh - prediction
        if self._gains_end:
            self._payload[: self._gains_end].view(torch.float32).copy_(gain)
        if self._errors_end > self._gains_end:
            error = (residual.square().sum() / fresh.float().square().sum().clamp_min(1e-30)).sqrt()
            self._payload[self._gains_end : self._errors_end].view(torch.float32).copy_(error)
        tokens = residual if self._codec.of_residuals else fresh
        if not self.sends_all:
            picked = pick(fresh, prediction if self._previous is None else self._previous)
            self._payload[self._errors_end : self._indices_end].view(torch.int32).copy_(picked)
            tokens = tokens.index_select(2, self.table[picked].flatten())
        self._codec.encode(tokens.reshape(self._vectors, -1), self._payload[self._coded_start :])

    def _update(self, received: torch.Tensor) -> None:
        """Carry the predictor a step forward with everybody's payloads, uint8 [N, size]."""
        assert self._predictor is not None
        ranks, width = received.shape[0], self.shape[-1]
        constant = self._config.gain if self._config.predict == "constant" else 0.0
        gains = torch.full((ranks, 2), constant, device=received.device)
        if self._gains_end:
            gains = received[:, : self._gains_end].contiguous().view(torch.float32)
        if self._errors_end > self._gains_end:
            self._errors = received[:, self._gains_end : self._errors_end].contiguous().view(torch.float32)
        tokens = None
        if not self.sends_all:
            picked = received[:, self._errors_end : self._indices_end].contiguous().view(torch.int32)
            tokens = self.table[picked.long()].flatten(1) + self._first_token
        coded = received[:, self._coded_start :].contiguous()
        vectors = self._codec.decode(coded, self._vectors, width)
        vectors = vectors.unflatten(1, (2, self.shape[1], self._sent_tokens)).permute(1, 2, 0, 3, 4)
        self._predictor.update(gains, vectors, tokens, self._codec.of_residuals)
