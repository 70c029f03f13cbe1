"""Buckets: the halo rows and moments of many layers in few large messages.

At a displaced step nobody waits for what is sent, so it need not go layer by layer. Layers append their tensors to an
open bucket in the order of their calls, which is the order in which the next step reads. A full bucket is sent, and a
layer's next call waits for its own bucket only. Which layers share one follows from settings, shapes and the order of
the calls alone, so it is the same on all ranks.

Rows may be coded: all of a bucket's at once, in 8 bits a number, when it is sent.

Shapes: P ranks that answer in a direction: 1 neighbour, or all R. V vectors of `_VECTOR` numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from otil_xdit.comm.collectives import CollectiveLabel, Collectives, CounterKey, Pending
from otil_xdit.errors import ExchangeTimeout
from otil_xdit.exchange.bucket_buffers import DIRECTIONS, Direction, IncomingMessage, OutgoingMessage, Sizes, TensorSpec
from otil_xdit.method.scratch import ScratchBuffers

LAYERS_PER_BUCKET = 24
"""A step of SD1.5's topology appends 113 times, of SDXL's about 85: five buckets and four. Fewer layers a bucket are
more messages, each with its latency. More layers leave the last bucket less time to travel before the first layers ask
again. The bound is not in bytes: how many a layer has grows with the image, and the number of buckets should not."""

PADDING = CounterKey("padding")
"""The counter of bytes that only keep the next part at a multiple of its element size."""


class BucketSlot:
    """One layer's place in a bucket.

    Attributes:
        outgoing: a tensor for each of the layer's specs, to be filled at once, before anything else is appended.
    """

    def __init__(
        self, bucketer: Bucketer, bucket: Bucket, offsets: list[tuple[TensorSpec, int]], outgoing: list[torch.Tensor]
    ) -> None:
        self.outgoing = outgoing
        self._bucketer, self._bucket, self._offsets = bucketer, bucket, offsets

    def receive(self) -> list[tuple[Direction, torch.Tensor]]:
        """Return what came for each spec, [P, *received], valid until `release`; empty where the bucket was dropped.

        What kernels have decoded (`is_fused`) is the layer's own from now on.

        Sends the bucket if it is open, and waits for it unless another layer has.

        Raises:
            ExchangeTimeout: naming the rank, the bucket's first layer and the step.
        """
        if not self._bucketer.arrived(self._bucket):
            return []
        incoming = self._bucket.incoming
        return [
            (spec.direction, incoming[spec.direction].at(offset, spec.received, spec)) for spec, offset in self._offsets
        ]

    def release(self) -> None:
        """Tell that the layer has read it; the buffers are used again when all layers of the bucket have."""
        self._bucketer.release(self._bucket)


class BucketedLayer(ABC):
    """A layer that appends to buckets: its calls in this generation, and its slot."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._receptions = 0  # of other ranks' tensors in this generation: two tell how they move
        self._slot: BucketSlot | None = None

    def begin(self) -> None:
        """Start a generation."""
        self.num_calls = 0
        self._receptions = 0

    def apply_pending(self) -> None:
        """Wait for what is under way, if anything is, and take it in."""
        slot, self._slot = self._slot, None
        if slot is not None:
            for direction, received in slot.receive():
                self._apply(direction, received)
            slot.release()

    @abstractmethod
    def _apply(self, direction: Direction, received: torch.Tensor) -> None:
        """Copy what came from a direction, [P, *shape]."""


class Bucketer:
    """The buckets of one group of ranks. Every rank must make the same calls in the same order.

    Args:
        collectives: carry them.
        scratch_of: returns a device's scratch buffers.
    """

    def __init__(self, collectives: Collectives, scratch_of: Callable[[torch.device], ScratchBuffers]) -> None:
        self._collectives, self._scratch_of = collectives, scratch_of
        self._open: Bucket | None = None
        self._sent: list[Bucket] = []
        self._free: list[Bucket] = []
        # Bytes of the largest bucket so far. Buckets are used for any layers, so each grows to that once.
        self._largest: Sizes = Counter()

    @property
    def nbytes(self) -> int:
        """Bytes kept on the device."""
        opened = [] if self._open is None else [self._open]
        return sum(bucket.nbytes for bucket in (*opened, *self._sent, *self._free))

    def append(self, specs: Sequence[TensorSpec], label: CollectiveLabel, device: torch.device) -> BucketSlot:
        """Return a slot of the open bucket, after sending it where it is full or of an earlier step.

        Args:
            specs: of the layer; those of one direction in the same order on every rank.
            label: the counter of the layer's bytes, its place and its step.
            device: of the buffers.
        """
        if self._open is not None and (self._open.step != label.step or self._open.layers == LAYERS_PER_BUCKET):
            self.send()
        if self._open is None:
            self._open = self._free.pop() if self._free else Bucket(self._collectives.group.world_size)
            self._open.start(label, self._scratch_of(device), self._largest)
        bucket = self._open
        offsets, outgoing = bucket.append(specs, label.counter)
        return BucketSlot(self, bucket, offsets, outgoing)

    def send(self) -> None:
        """Send the open bucket, if there is one."""
        if self._open is not None:
            bucket, self._open = self._open, None
            self._sent.append(bucket)
            self._largest |= bucket.send(self._collectives)

    def drop(self) -> None:
        """Forget what was appended and not sent: at the end of a generation, where nobody will read it.

        A rank that raised may have appended less than the others, so it must not send what it has: messages of
        different sizes would meet.
        """
        self._open = None

    def arrived(self, bucket: Bucket) -> bool:
        """Wait for a bucket, sending it first if it is open; return False for one that was dropped.

        Raises:
            ExchangeTimeout: as `BucketSlot.receive`. Whatever else is under way is given up, buffers too: it would
                not arrive either, and each bucket would be waited for until the timeout.
        """
        if bucket is self._open:
            self.send()
        if bucket not in self._sent:
            return False
        try:
            bucket.wait()
        except ExchangeTimeout:
            self._sent.clear()
            raise
        return True

    def release(self, bucket: Bucket) -> None:
        """Count a layer that has read; the last one frees the buffers."""
        bucket.unread -= 1
        if bucket.unread == 0 and bucket in self._sent:
            self._sent.remove(bucket)
            for message in bucket.incoming.values():
                message.release()
            self._free.append(bucket)

    def free(self) -> None:
        """Give the buffers back; nothing may be under way."""
        self._open = None
        self._sent.clear()
        self._free.clear()
        self._largest.clear()


class Bucket:
    """The messages to and from every direction, for the layers that are in it; used again and again.

    Args:
        ranks: R.
    """

    def __init__(self, ranks: int) -> None:
        self.outgoing = {direction: OutgoingMessage(1) for direction in DIRECTIONS}
        self.incoming = {
            direction: IncomingMessage(ranks if direction == "everybody" else 1) for direction in DIRECTIONS
        }
        self.step: int | None = None
        self.layers, self.unread = 0, 0
        self._shares: dict[Direction, Counter[CounterKey]] = {direction: Counter() for direction in DIRECTIONS}
        self._pending: list[Pending[torch.Tensor] | Pending[tuple[torch.Tensor, torch.Tensor]]] = []

    @property
    def nbytes(self) -> int:
        messages = (*self.outgoing.values(), *self.incoming.values())
        return sum(message.nbytes for message in messages)

    def start(self, label: CollectiveLabel, scratch: ScratchBuffers, largest: Sizes) -> None:
        """Empty it for the layers of a step.

        Args:
            label: of the first of them.
            scratch: for coding.
            largest: bytes of the largest bucket so far.
        """
        self.step, self.layers, self.unread = label.step, 0, 0
        self._label = replace(label, company=" and what is sent with it")
        self._scratch = scratch
        for direction in DIRECTIONS:
            self.outgoing[direction].start(
                scratch.device, largest["out", direction, "message"], largest["out", direction, "values"]
            )
            self.incoming[direction].start(
                scratch.device, largest["in", direction, "message"], largest["in", direction, "values"]
            )
            self._shares[direction].clear()

    def append(
        self, specs: Sequence[TensorSpec], counter: CounterKey
    ) -> tuple[list[tuple[TensorSpec, int]], list[torch.Tensor]]:
        """Return each spec's offset in the incoming message, and the tensors to write what is sent to."""
        offsets, outgoing = [], []
        for spec in specs:
            message, shares = self.outgoing[spec.direction], self._shares[spec.direction]
            offset, size, padding = message.reserve(spec.sent, spec)
            shares[counter] += size
            if padding:
                shares[PADDING] += padding
            outgoing.append(message.at(offset, spec.sent, spec)[0])
            offsets.append((spec, self.incoming[spec.direction].reserve(spec.received, spec)[0]))
        self.layers += 1
        self.unread += 1
        return offsets, outgoing

    def send(self, collectives: Collectives) -> Sizes:
        """Code what is to be coded, start all messages, and return the bytes of each."""
        sizes: Sizes = Counter()
        out, into = {}, {}
        for direction in DIRECTIONS:
            sent, received = self.outgoing[direction], self.incoming[direction]
            out[direction], into[direction] = sent.close(), received.close()
            sent.encode(self._scratch)
            sizes["out", direction, "message"], sizes["out", direction, "values"] = sent.sizes
            sizes["in", direction, "message"], sizes["in", direction, "values"] = received.sizes
        if out["everybody"].numel():
            # Displaced steps come after every warm-up and nothing but float32 moments goes here: one kind, no padding.
            (counter,) = self._shares["everybody"]
            label = replace(self._label, kind=counter.kind, phase=counter.phase)
            gathered = collectives.all_gather(out["everybody"][0], into["everybody"], label)
            self._pending.append(gathered)
        shares = self._shares["previous"], self._shares["next"]
        if any(shares):
            fill = into["previous"][0], into["next"][0]
            self._pending.append(collectives.neighbours(out["previous"][0], out["next"][0], fill, shares, self._label))
        return sizes

    def wait(self) -> None:
        """Wait for all messages and decode them, the first time."""
        if not self._pending:
            return
        while self._pending:
            self._pending.pop().wait()
        for message in self.incoming.values():
            message.decode(self._scratch)
