"""The messages of a group's layers: which layers wait to be sent together, and what is under way.

Shapes: L layers, l of them in a run; N patches.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from otil_xdit.comm.collectives import CollectiveLabel, Collectives, Pending
from otil_xdit.exchange.kv_coder import KVCoder


class KVMessages:
    """Sends and receives the payloads of a group's layers.

    Args:
        collectives: carry them.
        coder: fills and applies them.
        names: of the layers, in a list that grows while they join.
    """

    def __init__(self, collectives: Collectives, coder: KVCoder, names: list[str]) -> None:
        self._collectives, self._coder, self._names = collectives, coder, names
        self._received: torch.Tensor | None = None
        self._unsent: list[int] = []
        self._unsent_label = CollectiveLabel("kv", "", None)
        self._pending: list[tuple[slice, bool, Pending[torch.Tensor]]] = []

    def allocate(self, device: torch.device) -> None:
        """Make the buffer of what arrives for all layers."""
        size = len(self._names) * self._collectives.group.world_size * self._coder.most_bytes
        self._received = torch.zeros(size, dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device."""
        return 0 if self._received is None else self._received.nbytes

    def gather_now(self, layer: int, part: torch.Tensor, whole: torch.Tensor, label: CollectiveLabel) -> torch.Tensor:
        """Gather a layer's `part` of all ranks in `whole`, [N, *part.shape], and wait for it.

        Args:
            layer: its place.
            part, whole: tensors.
            label: names any of the layers.
        """
        return self._collectives.all_gather(part, whole, self._label_of(slice(layer, layer + 1), label)).wait()

    def exchange_now(self, layer: int, label: CollectiveLabel, out: torch.Tensor) -> None:
        """Send a layer's payload, wait for everybody's, and have the copies follow, and `out`; see `apply_pending`."""
        self.send(slice(layer, layer + 1), label, is_awaited=True)
        self.apply_pending(out)

    def send(self, run: slice, label: CollectiveLabel, is_awaited: bool = False) -> None:
        """Start sending the payloads of a run of layers, which are waited for at this step or at the next."""
        assert self._received is not None, "the first step is synchronous, and buffers are made after it"
        self._coder.settle(run)  # what was taken lies where the others' payloads of this step go
        payload, ranks = self._coder.pack(run, is_awaited), self._collectives.group.world_size
        received = self._received[run.start * ranks * self._coder.most_bytes :][: ranks * payload.numel()]
        received = received.view(ranks, *payload.shape)
        pending = self._collectives.all_gather(payload, received, self._label_of(run, label))
        self._pending.append((run, is_awaited, pending))

    def defer(self, layer: int, label: CollectiveLabel, called: int) -> None:
        """Have a layer wait for the rest of its group; the last one sends them all.

        Args:
            layer: its place.
            label: of the step.
            called: layers that are called in this generation: those of another pass may not be.
        """
        self._unsent.append(layer)
        self._unsent_label = label
        if len(self._unsent) == called:
            self.send_deferred()

    def send_deferred(self) -> None:
        """Send the layers that wait, neighbours in one message."""
        layers, self._unsent = sorted(self._unsent), []
        for first in [layer for layer in layers if layer - 1 not in layers]:
            last = next(layer for layer in layers if layer >= first and layer + 1 not in layers)
            self.send(slice(first, last + 1), self._unsent_label)

    def send_before(self, layer: int, label: CollectiveLabel) -> None:
        """Send the layers that wait if this call does not belong to them: it is one of them again, or another step."""
        if self._unsent and (layer in self._unsent or self._unsent_label != label):
            self.send_deferred()

    def take_pending(self) -> None:
        """Wait for what is under way, if anything is; of a layer the copies follow by `KVCoder.write_predicted`."""
        pending, self._pending = self._pending, []
        for run, is_awaited, message in pending:
            self._coder.take(run, message.wait(), is_awaited)

    def apply_pending(self, out: torch.Tensor | None = None) -> None:
        """Wait for what is under way, if anything is, and have all copies follow it.

        Args:
            out: becomes everybody's values of the only layer that is under way, as of `KVCopies.write`.
        """
        pending, self._pending = self._pending, []
        for run, is_awaited, message in pending:
            self._coder.apply(run, message.wait(), is_awaited, out)

    def discard(self) -> None:
        """Wait for what is under way, and forget it and what was not sent yet."""
        pending, self._pending = self._pending, []
        self._unsent.clear()
        for *_, message in pending:
            message.wait()

    def _label_of(self, run: slice, label: CollectiveLabel) -> CollectiveLabel:
        first, last = self._names[run.start], self._names[run.stop - 1]
        return replace(label, layer=f"layer {first}" if first == last else f"layers {first} to {last}")
