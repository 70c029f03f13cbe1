"""A U-Net's small exchanges: the halo rows of its convolutions and the moments of its group norms, by layer.

Shapes: B batch, C channels, W columns, G groups, R ranks that hold rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from otil_xdit.comm.collectives import CollectiveLabel, Collectives
from otil_xdit.exchange.buckets import Bucketer
from otil_xdit.exchange.halo import HaloLayer, HaloRows, PaddedRoom, halo_key
from otil_xdit.exchange.modes import StepModes
from otil_xdit.exchange.moments import MomentsLayer, moments_key
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.memory_format import is_channels_last
from otil_xdit.method.schedule import Clock
from otil_xdit.method.scratch import ScratchBuffers


class SmallLayers:
    """The convolutions and group norms of one pipeline, and the buckets that they share.

    `otil_xdit.exchange.communicator.OtilCommunicator` documents the arguments of `halo`, `moments` and `norm_halo`.

    Args:
        collectives: of the ranks that hold rows.
        config: the settings.
        modes: of the step under way.
        clock: of the steps.
        scratch_of: returns a device's scratch buffers.
    """

    def __init__(
        self,
        collectives: Collectives,
        config: OtilConfig,
        modes: StepModes,
        clock: Clock,
        scratch_of: Callable[[torch.device], ScratchBuffers],
    ) -> None:
        self._collectives, self._config, self._modes, self._clock = collectives, config, modes, clock
        self._scratch_of = scratch_of
        self._bucketer = Bucketer(collectives, scratch_of)
        # Of halo rows and moments that are a step old; keys and values have one of each layer and step.
        self._gain = 0.0 if config.extrapolation == "none" else config.extrapolation_gain
        self._halos: dict[str, HaloLayer] = {}
        self._moments: dict[str, MomentsLayer] = {}
        self._room: PaddedRoom | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device."""
        return sum(layer.nbytes for layer in self._layers()) + self._bucketer.nbytes

    def begin(self) -> None:
        """Start a generation."""
        for layer in self._layers():
            layer.begin()

    def apply_pending(self) -> None:
        """Wait for what is under way."""
        for layer in self._layers():
            layer.apply_pending()

    def send_bucket(self) -> None:
        """Send what layers have appended so far."""
        self._bucketer.send()

    def drop_bucket(self) -> None:
        """Forget what was appended and not sent; see `Bucketer.drop`."""
        self._bucketer.drop()

    def clear(self) -> None:
        """Give the buffers back; nothing may be under way."""
        self._halos.clear()
        self._moments.clear()
        self._bucketer.free()
        self._room = None

    def halo(self, name: str, x: torch.Tensor, above: int, below: int, precomputed: HaloRows | None) -> torch.Tensor:
        """Return a map with its halo, [B, C, above + rows + below, W]."""
        layer = self._halo_layer(name, x, above, below)
        room = self._room if self._room is not None and self._room.holds(x, above, below) else None
        if precomputed is not None:
            return layer.set_halo(x, precomputed, room)
        mode = self._modes.of_small(self._config.halo, layer.num_calls)
        return layer.pad_with_halo(x, mode, self._label("halo", f"the halo of layer {name}", layer.num_calls), room)

    def room_for(self, x: torch.Tensor, above: int, below: int) -> torch.Tensor:
        """Return room for a map like `x`, [B, C, rows, W], where `halo` need not copy it, in its memory format."""
        self._room = PaddedRoom.of(x, above, below, is_channels_last(x), self._scratch_of(x.device))
        return self._room.inside

    def moments(
        self, name: str, mean: torch.Tensor, var: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the whole maps' mean and biased variance, float32 [B, G]."""
        layer = self._moments_layer(name, mean)
        mode = self._modes.of_small(self._config.moments, layer.num_calls)
        label = self._label("moments", f"the moments of layer {name}", layer.num_calls)
        return layer.combine(mean, var, share, mode, label)

    def norm_halo(
        self,
        names: tuple[str, str],
        mean: torch.Tensor,
        var: torch.Tensor,
        share: torch.Tensor,
        x: torch.Tensor,
        above: int,
        below: int,
    ) -> tuple[torch.Tensor, torch.Tensor, HaloRows] | None:
        """Return moments and the neighbours' rows of `x`, for one wait; None unless both wait for this step's."""
        norm, conv = self._moments_layer(names[0], mean), self._halo_layer(names[1], x, above, below)
        small = self._modes.of_small
        modes = small(self._config.moments, norm.num_calls), small(self._config.halo, conv.num_calls)
        if modes != ("sync", "sync"):
            return None
        both = f"the moments of layer {names[0]} and rows of its map"
        labels = self._label("moments", both, norm.num_calls), self._label("halo", both, conv.num_calls)
        return norm.combine_with_rows(mean, var, share, conv, x, labels)

    def _label(self, kind: str, layer: str, num_calls: int) -> CollectiveLabel:
        return CollectiveLabel(kind, layer, self._clock.step, self._modes.phase(num_calls))

    def _layers(self) -> list[HaloLayer | MomentsLayer]:
        return [*self._halos.values(), *self._moments.values()]

    def _halo_layer(self, name: str, x: torch.Tensor, above: int, below: int) -> HaloLayer:
        layer = self._halos.get(name)
        if layer is None or layer.key != halo_key(x, above, below):
            if layer is not None:
                layer.apply_pending()  # what it has under way, before its buffers go
            coded = self._config.codec != "raw"
            scratch = self._scratch_of(x.device)
            layer = HaloLayer(self._collectives, self._bucketer, scratch, x, above, below, self._gain, coded)
            self._halos[name] = layer
        return layer

    def _moments_layer(self, name: str, mean: torch.Tensor) -> MomentsLayer:
        layer = self._moments.get(name)
        if layer is None or layer.key != moments_key(mean):
            if layer is not None:
                layer.apply_pending()  # as above
            layer = self._moments[name] = MomentsLayer(self._collectives, self._bucketer, mean, self._gain)
        return layer
