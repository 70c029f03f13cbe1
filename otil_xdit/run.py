"""`OtilRun`: everything that a generation needs to remember about the exchange between patches.

One object owns it all (buffers, step counter, polling, counters). It is handed to whoever needs it; no module of
this package keeps state of its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional

from otil_xdit.borders import Beyond, HaloLayer, MomentsLayer, halo_key, moments_key
from otil_xdit.config import OtilConfig, SmallFreshness
from otil_xdit.exchange import Exchange, PatchGroup
from otil_xdit.grid import TokenLayout, block_table, image_positions
from otil_xdit.kv import KVLayer
from otil_xdit.schedule import Clock, Mode, Schedule
from otil_xdit.selection import CHANGE_SCORES, Selector


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


@dataclass
class _Geometry:
    """Sub-blocks of one kind of sequence, and their picks where all its layers share them."""

    table: torch.Tensor
    image_token: torch.Tensor
    image_tokens: int
    picked: torch.Tensor | None = None
    picked_at: int = -1


class OtilRun:
    """The exchange of one pipeline's patches, over any number of generations.

    Args:
        config: the settings.
        group: the ranks that hold the patches.
    """

    def __init__(self, config: OtilConfig, group: PatchGroup) -> None:
        self.config, self.group = config, group
        self.exchange = Exchange(group, config.timeout)
        self._rows = Exchange(group.rows or group, config.timeout, self.exchange.traffic)
        self._replica = Exchange(group.replica or group, config.timeout, self.exchange.traffic)
        self.clock = Clock()
        self.layout = TokenLayout(chunks=group.ulysses_degree)
        self._schedule = Schedule.from_config(config)
        self._layers: dict[str, KVLayer] = {}
        self._halos: dict[str, HaloLayer] = {}
        self._moments: dict[str, MomentsLayer] = {}
        self._geometries: dict[tuple[TokenLayout, int], _Geometry] = {}
        self._selectors: dict[object, Selector] = {}
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._latent: torch.Tensor | None = None
        self._previous_latent: torch.Tensor | None = None
        self._latent_at = -1
        self._generator = torch.Generator()

    def begin(self) -> None:
        """Start a generation: nothing of the last one may show in it."""
        self.end()
        self.clock.reset()
        self.exchange.traffic.clear()
        self._latent = self._previous_latent = None
        self._latent_at = -1
        self._generator.manual_seed(self.config.seed + self.group.rank)
        for layer in self._all_layers():
            layer.visits = 0
        for selector in self._selectors.values():
            selector.reset()
        for geometry in self._geometries.values():
            geometry.picked, geometry.picked_at = None, -1

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
        self._geometries.clear()
        self._selectors.clear()
        self._workspace = self._workspace.new_empty(0)

    def observe(self, latent: torch.Tensor | None, layout: TokenLayout) -> None:
        """Take note of what the network is called with.

        Args:
            latent: this rank's rows of the latent, [B, C, rows, cols], or None where they are not known; the second
                call within a step (a separate pass without the prompt) changes nothing.
            layout: what this rank's attention sequences are made of, until the next call.
        """
        self.layout = layout
        if latent is not None and self.config.select.startswith("latent") and self._latent_at != self.clock.step:
            self._previous_latent, self._latent = self._latent, latent.detach().clone()
            self._latent_at = self.clock.step

    def gather(self, name: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Everybody's keys and values for one attention call.

        Args:
            name: tells the layer from every other one; equal on all ranks and from step to step.
            key, value: this rank's, [B, H, S, D].

        Returns:
            Two [B, H, N * S, D], to be read before the layer's next call; this rank's part is fresh.
        """
        layer = self._layer(name, key)
        fresh = torch.stack([key, value])
        mode = self._schedule.mode(self.clock.step, layer.visits)
        picked = None
        if mode == "displaced" and not layer.sends_all:
            picked = self._pick(name, layer, fresh)
        kind = self._kind("kv", layer.visits)
        full = layer.gather(fresh, mode, picked, self._sync_workspace(fresh, mode), self.clock.step, kind)
        return full[0], full[1]

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
            buffer_bytes=sum(layer.nbytes for layer in self._all_layers()) + self._workspace.nbytes,
        )

    def _all_layers(self) -> list[KVLayer | HaloLayer | MomentsLayer]:
        return [*self._layers.values(), *self._halos.values(), *self._moments.values()]

    def _kind(self, what: str, visits: int) -> str:
        """The counter that a layer's bytes go to: those of warm-up steps are kept apart."""
        return f"{what}-warmup" if min(self.clock.step, visits) < self.config.warmup_steps else what

    def _small_mode(self, freshness: SmallFreshness, visits: int) -> Mode:
        mode = self._schedule.mode(self.clock.step, visits)
        return "sync" if mode == "displaced" and freshness == "fresh" else mode

    @staticmethod
    def _discard(layer: KVLayer | HaloLayer | MomentsLayer | None) -> None:
        """Wait for what a layer has under way before its buffers go."""
        if layer is not None:
            layer.drain()

    def _layer(self, name: str, key: torch.Tensor) -> KVLayer:
        layer = self._layers.get(name)
        if layer is None or layer.shape != key.shape or layer.dtype != key.dtype:
            self._discard(layer)
            table = self._geometry(key.shape[2], key.device).table
            layer = self._layers[name] = KVLayer(self.exchange, name, key, table, self.config.ratio)
            self._selectors.pop(name, None)
        return layer

    def _geometry(self, tokens: int, device: torch.device) -> _Geometry:
        found = self._geometries.get((self.layout, tokens))
        if found is None:
            segments = self.layout.segments(tokens)
            table = block_table(segments, max(1, self.config.block // self.layout.pixels))
            image_token = image_positions(segments)
            found = _Geometry(table.to(device), image_token.to(device), int(image_token.max()) + 1)
            self._geometries[self.layout, tokens] = found
        return found

    def _sync_workspace(self, fresh: torch.Tensor, mode: Mode) -> torch.Tensor:
        """Room for everybody's `fresh`, shared by all layers: a synchronous gather is over before the next begins."""
        shape = (self.group.world_size if mode == "sync" else 0, *fresh.shape)
        size = self.group.world_size * fresh.nbytes if mode == "sync" else 0
        if self._workspace.nbytes < size or self._workspace.device != fresh.device:
            self._workspace = torch.empty(size, dtype=torch.uint8, device=fresh.device)
        return self._workspace[:size].view(fresh.dtype).view(shape)

    def _pick(self, name: str, layer: KVLayer, fresh: torch.Tensor) -> torch.Tensor:
        """The sub-blocks that this rank sends of a layer now; int64 [k]."""
        source, _, criterion = self.config.select.partition("-")
        if source == "kv":
            scores = CHANGE_SCORES[criterion](fresh, layer.previous, layer.table)
            return self._selector(name, layer).pick(scores)
        geometry = self._geometry(fresh.shape[3], fresh.device)
        if geometry.picked is None or geometry.picked_at != self.clock.step:
            scores = self._random_scores(geometry) if source == "random" else self._latent_scores(geometry, criterion)
            geometry.picked = self._selector((self.layout, fresh.shape[3]), layer).pick(scores)
            geometry.picked_at = self.clock.step
        return geometry.picked

    def _selector(self, key: object, layer: KVLayer) -> Selector:
        if key not in self._selectors:
            self._selectors[key] = Selector(layer.table.shape[0], self.config.ratio, self.config.polling)
        return self._selectors[key]

    def _random_scores(self, geometry: _Geometry) -> torch.Tensor:
        return torch.rand(geometry.table.shape[0], generator=self._generator).to(geometry.table.device)

    def _latent_scores(self, geometry: _Geometry, criterion: str) -> torch.Tensor:
        """Change of the latent under each sub-block; text has no latent and is sent by polling alone."""
        positions = geometry.image_token[geometry.table]
        latent, previous = (self._as_tokens(seen) for seen in (self._latent, self._previous_latent))
        if latent is None or previous is None or latent.shape[-2] != geometry.image_tokens:
            raise ValueError(
                f"otil_select {self.config.select} needs a latent whose sub-blocks can be told apart, which this model "
                "or this Ulysses degree does not give; choose kv-cosine or kv-l2"
            )
        scores = CHANGE_SCORES[criterion](latent, previous, positions.clamp_min(0))
        return scores.masked_fill(positions[:, 0] < 0, torch.finfo(scores.dtype).min)

    def _as_tokens(self, latent: torch.Tensor | None) -> torch.Tensor | None:
        """The latent pixels under each image token of the layout: [B, S_image, C * pixels**2], zeros where padded."""
        if latent is None or self.layout.rows == 0:
            return None
        side = self.layout.pixels
        rows, cols = self.layout.rows * side - latent.shape[2], self.layout.cols * side - latent.shape[3]
        padded = functional.pad(latent, (0, max(cols, 0), 0, max(rows, 0)))
        return functional.pixel_unshuffle(padded, side).flatten(2).transpose(1, 2)
