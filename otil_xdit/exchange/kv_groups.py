"""Which attention layers share a message: groups of equal shape that are called one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from otil_xdit.comm.collectives import CollectiveLabel, Collectives
from otil_xdit.exchange.kv import KVGroup
from otil_xdit.exchange.kv_coordinates import LayerCoordinates
from otil_xdit.exchange.pass_agreement import PassAgreement
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.gain_trend import GainTrend
from otil_xdit.method.schedule import Mode
from otil_xdit.method.scratch import ScratchBuffers
from otil_xdit.method.selection import BlockSelector


class KVGroups:
    """The groups of one pipeline's attention layers.

    Args:
        collectives: carry the payloads.
        config: the settings.
        selector: says what to send.
        scratch_of: returns a device's scratch buffers.
        coordinates: knows the layers' coordinates; None where they have none.
        agreement: with the ranks of the other pass; None where there are none, or nothing to agree on.
    """

    def __init__(
        self,
        collectives: Collectives,
        config: OtilConfig,
        selector: BlockSelector,
        scratch_of: Callable[[torch.device], ScratchBuffers],
        coordinates: LayerCoordinates | None = None,
        agreement: PassAgreement | None = None,
    ) -> None:
        self.groups: list[KVGroup] = []
        self._collectives, self._config = collectives, config
        self._selector, self._scratch_of = selector, scratch_of
        self._coordinates, self._agreement = coordinates, agreement
        self._places: dict[str, tuple[KVGroup, int]] = {}
        self._called: KVGroup | None = None
        self._fitted_at: int | None = None
        self._trend = GainTrend()

    def begin(self) -> None:
        """Start a generation."""
        self._fitted_at = None
        self._trend.begin()
        for group in self.groups:
            group.begin()

    @property
    def nbytes(self) -> int:
        """Bytes that the layers keep on their devices."""
        return sum(group.nbytes for group in self.groups) + self._trend.nbytes

    def clear(self) -> None:
        """Give the buffers back."""
        self.groups.clear()
        self._places.clear()
        self._called = None

    def call(self, name: str, key: torch.Tensor) -> tuple[KVGroup, int]:
        """Return the group of the layer that is called, and its place there.

        A group that was called before sends what waits for its other layers.

        Args:
            name: of the layer.
            key: [B, H, S, D].
        """
        group, layer = self._place(name, key)
        if self._called is not None and self._called is not group:
            self._called.send_pending()
        self._called = group
        return group, layer

    def agree_on_gains(self, mode: Mode, label: CollectiveLabel) -> None:
        """Have both passes of guidance go on with the mean of what they expect of their gains.

        They wait for each other at the first layer of a step that follows one whose payloads were waited for.

        Args:
            mode: of the layer that is called.
            label: of its step.
        """
        if self._agreement is None or self._config.extrapolation != "fitted":
            return
        if self._fitted_at is not None and self._fitted_at != label.step:
            gains = [group.expected_gains for group in self.groups if group.is_allocated]
            torch._foreach_copy_(gains, self._agreement.mean(gains, replace(label, layer="the gains of all layers")))
            self._fitted_at = None
        if mode == "fresh":
            self._fitted_at = label.step

    def place_of(self, name: str) -> tuple[KVGroup, int]:
        """Return the group of a layer that has been called, and its place there."""
        return self._places[name]

    def _place(self, name: str, key: torch.Tensor) -> tuple[KVGroup, int]:
        batch, heads, tokens, size = key.shape
        shape = torch.Size((2, batch, tokens, heads * size))
        group, layer = self._places.get(name, (None, 0))
        if group is not None and group.shape == shape and group.dtype == key.dtype:
            if group.num_calls[layer]:
                group.allocate()
            return group, layer
        if group is not None:
            self._discard(group)
        table = self._selector.table(tokens, key.device)
        group = self.groups[-1] if self.groups else None
        if group is None or not group.fits(shape, key.dtype, table):
            if group is not None:
                group.allocate()
            group = self._new_group(name, shape, key.dtype, table)
        coordinates = None if self._coordinates is None else self._coordinates.make(name, key)
        self._places[name] = group, group.join(name, coordinates)
        return self._places[name]

    def _new_group(self, name: str, shape: torch.Size, dtype: torch.dtype, table: torch.Tensor) -> KVGroup:
        self._selector.discard(name)
        scratch = self._scratch_of(table.device)
        given = self._selector, scratch, self._trend, self._agreement
        group = KVGroup(self._collectives, shape, dtype, table, self._config, *given)
        self.groups.append(group)
        return group

    def _discard(self, group: KVGroup) -> None:
        """Let a group go of which a layer has another shape now, once nothing of it is under way.

        Its other layers join others when they are called next, as they would in a run that has just begun: otherwise
        they would keep its buffers, and its name for selection, beside those of the layer that has left.
        """
        group.discard_pending()
        self.groups.remove(group)
        self._places = {key: place for key, place in self._places.items() if place[0] is not group}
        self._called = None if self._called is group else self._called


def check_copies(collectives: Collectives, group: KVGroup, layer: int, step: int) -> None:
    """Compare a digest of a layer's copies on all ranks.

    Raises:
        RuntimeError: on every rank where they are not the same, bit for bit.
    """
    name, ranks, rank = group.names[layer], collectives.group.world_size, collectives.group.rank
    digest = torch.stack([_digest(tensor) for tensor in group.shared_state(layer)])
    everybody = digest.new_empty(ranks, *digest.shape)
    collectives.all_gather(digest, everybody, CollectiveLabel("check", f"the check of layer {name}", step)).wait()
    different = [other for other in range(1, ranks) if not everybody[other].equal(everybody[0])]
    if different:
        raise RuntimeError(
            f"rank {rank}: the copies of layer {name} at step {step} on ranks {different} are not those of rank 0"
        )


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """Return a number, int64, that tells tensors apart unless by chance: exact, whatever the order of the sum."""
    words = tensor.contiguous().view(-1).view(torch.uint8).long()
    return ((words + 1) * (torch.arange(words.numel(), device=words.device) % 65521 + 1)).sum()
