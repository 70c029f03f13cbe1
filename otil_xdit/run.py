"""`OtilRun`: everything that a generation needs to remember about the exchange between patches.

One object owns it all (buffers, step counter, polling, counters). It is handed to whoever needs it; no module of
this package keeps state of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from otil_xdit.borders import Beyond, HaloLayer, MomentsLayer, halo_key, moments_key
from otil_xdit.config import OtilConfig, SmallFreshness
from otil_xdit.exchange import Exchange, PatchGroup
from otil_xdit.grid import TokenLayout
from otil_xdit.kv import KVLayer
from otil_xdit.picking import Picker
from otil_xdit.schedule import Clock, Mode, Schedule


@dataclass(frozen=True)
class Report:
    """What one rank sent in one generation; bytes as handed to the collectives.

    The figures per step are means over the steps after warm-up: `kv_bytes_per_step` of keys and values, the figure that
    strategies are compared by; `small_bytes_per_step` of a U-Net's halo rows and moments; `output_bytes_per_step` of
    its noise prediction, which is the same whatever the strategy.
    """

    steps: int
    warmup_steps: int
    kv_bytes_per_step: float
    small_bytes_per_step: float
    output_bytes_per_step: float
    sent_bytes: dict[str, int]
    messages: dict[str, int]
    waited_seconds: float
    buffer_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class OtilRun:
    """The exchange of one pipeline's patches, over any number of generations.

    Args:
        config: the settings.
        group: the ranks that hold the patches.
        make_exchange: what carries the messages of a group of ranks; arguments as those of `Exchange`.
    """

    def __init__(
        self, config: OtilConfig, group: PatchGroup, make_exchange: Callable[..., Exchange] = Exchange
    ) -> None:
        self.config, self.group = config, group
        self.exchange = make_exchange(group, config.timeout)
        self._rows = make_exchange(group.rows or group, config.timeout, self.exchange.traffic)
        self._replica = make_exchange(group.replica or group, config.timeout, self.exchange.traffic)
        self.clock = Clock()
        self._schedule = Schedule.from_config(config)
        self._picker = Picker(config, self.clock, group)
        self._layers: dict[str, KVLayer] = {}
        self._halos: dict[str, HaloLayer] = {}
        self._moments: dict[str, MomentsLayer] = {}
        self._rooms: dict[str, torch.Tensor] = {}

    def begin(self) -> None:
        """Start a generation: nothing of the last one may show in it."""
        self.end()
        self.clock.reset()
        self.exchange.traffic.clear()
        self._picker.begin()
        for layer in self._layers.values():
            layer.begin()
        for halo in self._halos.values():
            halo.visits = 0
        for moments in self._moments.values():
            moments.visits = 0

    def end(self) -> None:
        """Finish what is still under way; also after an exception, before buffers are used again."""
        for layer in self._all_layers():
            layer.drain()

    def free(self) -> None:
        """Give the buffers back."""
        self.end()
        self._layers.clear()
        self._halos.clear()
        self._moments.clear()
        self._picker.free()
        self._rooms.clear()

    def observe(self, latent: torch.Tensor | None, layout: TokenLayout) -> None:
        """Take note of what the network is called with.

        Args:
            latent: this rank's rows of the latent, [B, C, rows, cols], or None where they are not known; the second
                call within a step (a separate pass without the prompt) changes nothing.
            layout: what this rank's attention sequences are made of, until the next call.
        """
        self._picker.observe(latent, layout)

    def gather(self, name: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Everybody's keys and values for one attention call.

        Args:
            name: tells the layer from every other one; equal on all ranks and from step to step.
            key, value: this rank's, [B, H, S, D].

        Returns:
            Two [B, H, N * S, D], to be read before the next call of any layer; this rank's part is fresh.
        """
        # Token by token, [2, B, S, C]: what is picked, coded and predicted is tokens.
        fresh = torch.stack([key.transpose(1, 2), value.transpose(1, 2)]).flatten(3)
        layer = self._layer(name, fresh)
        layer.absorb()
        mode = self._schedule.mode(self.clock.step, layer.visits, self.clock.total)
        if mode == "displaced" and 0 < self.config.tolerance < layer.error:
            mode = "fresh"
        if self.config.check and mode != "sync":
            self._compare(layer, name)
        kind = self._kind("kv", layer.visits)
        pick = partial(self._picker.pick, name, layer.table)
        whole = layer.gather(fresh, mode, pick, partial(self._room, fresh.device), self.clock.step, kind)
        heads = whole.unflatten(3, (key.shape[1], -1)).transpose(2, 3)
        return heads[0], heads[1]

    def halo(self, name: str, x: torch.Tensor, above: int, below: int, given: Beyond | None = None) -> torch.Tensor:
        """`x`, [B, C, rows, W], between `above` rows of the rank before and `below` of the one after.

        Zeros stand beyond the edges of the image. `name` as in `gather`; `given` are the rows where they are known
        already (on every rank alike, see `norm_halo`), and no message is sent.
        """
        layer = self._halo_layer(name, x, above, below)
        if given is not None:
            return layer.put(x, given)
        mode = self._small_mode(self.config.halo, layer.visits)
        return layer.widen(x, mode, self.clock.step, self._kind("halo", layer.visits))

    def moments(
        self, name: str, mean: torch.Tensor, var: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole maps' mean and biased variance from this rank's, as far as the settings let it know them.

        Args:
            name: as in `gather`.
            mean, var: float32 [B, G].
            share: [R], every rank's share of the rows.
        """
        layer = self._moments_layer(name, mean)
        mode = self._small_mode(self.config.moments, layer.visits)
        return layer.combine(mean, var, share, mode, self.clock.step, self._kind("moments", layer.visits))

    def norm_halo(
        self,
        names: tuple[str, str],
        mean: torch.Tensor,
        var: torch.Tensor,
        share: torch.Tensor,
        x: torch.Tensor,
        above: int,
        below: int,
    ) -> tuple[torch.Tensor, torch.Tensor, Beyond] | None:
        """What `moments` gives, and the rows of `x` above and below this rank's, which it waits for together.

        Args:
            names: of the group norm that asks for the moments, and of the convolution that is to read those rows (once
                the norm has made something of them) by `halo`.
            mean, var, share: as in `moments`.
            x: what the norm is given, [B, C, rows, W].
            above, below: number of rows.

        Returns:
            None where the settings have one or both a step late; `moments` and `halo` are then asked apart.
        """
        norm, conv = self._moments_layer(names[0], mean), self._halo_layer(names[1], x, above, below)
        modes = self._small_mode(self.config.moments, norm.visits), self._small_mode(self.config.halo, conv.visits)
        if modes != ("sync", "sync"):
            return None
        kinds = self._kind("moments", norm.visits), self._kind("halo", conv.visits)
        return norm.combine_with_rows(mean, var, share, conv, x, self.clock.step, kinds)

    def _halo_layer(self, name: str, x: torch.Tensor, above: int, below: int) -> HaloLayer:
        layer = self._halos.get(name)
        if layer is None or layer.key != halo_key(x, above, below):
            self._discard(layer)
            layer = self._halos[name] = HaloLayer(self._rows, name, x, above, below)
        return layer

    def _moments_layer(self, name: str, mean: torch.Tensor) -> MomentsLayer:
        layer = self._moments.get(name)
        if layer is None or layer.key != moments_key(mean):
            self._discard(layer)
            layer = self._moments[name] = MomentsLayer(self._rows, name, mean)
        return layer

    def collect(self, part: torch.Tensor, kind: str = "output") -> torch.Tensor:
        """A tensor of the same shape on every rank that works on the image, from all of them: [N, *part.shape].

        Args:
            part: this rank's, contiguous.
            kind: the counter that the bytes go to, and its name in error messages.
        """
        step = self.clock.step
        gathered = part.new_empty(self._replica.group.world_size, *part.shape)
        counter = f"{kind}-warmup" if step < self.config.warmup_steps else kind
        return self._replica.all_gather(part, gathered, counter, f"the {kind} at step {step}").wait()

    def report(self) -> Report:
        """Counters of the last (or current) generation, for this rank."""
        traffic = self.exchange.traffic
        steps = self.clock.step
        after_warmup = max(steps - self.config.warmup_steps, 0)
        return Report(
            steps=steps,
            warmup_steps=min(self.config.warmup_steps, steps),
            kv_bytes_per_step=traffic.sent["kv"] / max(after_warmup, 1),
            small_bytes_per_step=(traffic.sent["halo"] + traffic.sent["moments"]) / max(after_warmup, 1),
            output_bytes_per_step=traffic.sent["output"] / max(after_warmup, 1),
            sent_bytes=dict(traffic.sent),
            messages=dict(traffic.messages),
            waited_seconds=sum(traffic.waited.values()),
            buffer_bytes=sum(holder.nbytes for holder in (*self._all_layers(), *self._rooms.values())),
        )

    def _all_layers(self) -> list[KVLayer | HaloLayer | MomentsLayer]:
        return [*self._layers.values(), *self._halos.values(), *self._moments.values()]

    def _kind(self, what: str, visits: int) -> str:
        """The counter that a layer's bytes go to: those of warm-up steps are kept apart."""
        return f"{what}-warmup" if min(self.clock.step, visits) < self.config.warmup_steps else what

    def _small_mode(self, freshness: SmallFreshness, visits: int) -> Mode:
        mode = self._schedule.mode(self.clock.step, visits, self.clock.total)
        return "sync" if mode == "fresh" or (mode == "displaced" and freshness == "fresh") else mode

    @staticmethod
    def _discard(layer: KVLayer | HaloLayer | MomentsLayer | None) -> None:
        """Wait for what a layer has under way before its buffers go."""
        if layer is not None:
            layer.drain()

    def _layer(self, name: str, fresh: torch.Tensor) -> KVLayer:
        layer = self._layers.get(name)
        if layer is None or layer.shape != fresh.shape or layer.dtype != fresh.dtype:
            self._discard(layer)
            table = self._picker.table(fresh.shape[2], fresh.device)
            layer = self._layers[name] = KVLayer(self.exchange, name, fresh, table, self.config)
            self._picker.forget(name)
        return layer

    def _room(self, device: torch.device, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Room that all layers use in turn; it grows to the largest."""
        size = math.prod(shape) * dtype.itemsize
        room = self._rooms.get(name)
        if room is None or room.nbytes < size or room.device != device:
            room = self._rooms[name] = torch.empty(size, dtype=torch.uint8, device=device)
        return room[:size].view(dtype).view(shape)

    def _compare(self, layer: KVLayer, name: str) -> None:
        """Raise `RuntimeError` on every rank where the ranks' copies of a layer are not the same, bit for bit."""
        step = self.clock.step
        digest = torch.stack([_digest(tensor) for tensor in layer.shared_state])
        everybody = digest.new_empty(self.group.world_size, *digest.shape)
        self.exchange.all_gather(digest, everybody, "check", f"the check of layer {name} at step {step}").wait()
        different = [rank for rank in range(1, self.group.world_size) if not everybody[rank].equal(everybody[0])]
        if different:
            raise RuntimeError(
                f"rank {self.group.rank}: the copies of layer {name} at step {step} on ranks {different} are not those "
                "of rank 0"
            )


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """A number, int64, that tells tensors apart unless by chance: exact, whatever the order of the sum."""
    words = tensor.contiguous().view(-1).view(torch.uint8).long()
    return ((words + 1) * (torch.arange(words.numel(), device=words.device) % 65521 + 1)).sum()
