"""Parcels: what many layers have for the other ranks, in few large messages.

At a displaced step nobody waits for what is sent, so it need not go layer by layer. Layers append their part to an
open parcel in the order of their calls, which is the order in which the next step reads; a full parcel is sent, and a
layer's next call waits for its own parcel only. Which layers share one follows from settings, shapes and the order of
the calls alone, so it is the same on all ranks.

Rows may be coded: all of a parcel's at once, in 8 bits a number, when it is sent.

Shapes: P ranks that answer on a lane: 1 neighbour, or all R. V vectors of `_VECTOR` numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from otil_xdit.codec import Quantised
from otil_xdit.exchange import Exchange, ExchangeTimeout, Pending
from otil_xdit.workspace import Workspace

LAYERS_PER_PARCEL = 24
"""A step of SD1.5's topology appends 113 times, of SDXL's about 85: five parcels and four. Fewer layers a parcel are
more messages, each with its latency; more layers leave the last parcel less time to travel before the first layers ask
again. Not bytes: how many a layer has grows with the picture, and the number of parcels should not."""

PADDING = "padding"
"""The counter of bytes that only keep the next part at a multiple of its element size."""

Lane = Literal["previous", "next", "everybody"]
"""Where a part goes, and whence the answer comes: the rank before, the rank after, or all ranks."""

Sizes = Counter[tuple[Literal["out", "in"], Lane, Literal["message", "values"]]]
"""Bytes of the buffers of a parcel: of what is sent and received, and of what is coded in it."""

_LANES: tuple[Lane, ...] = ("previous", "next", "everybody")

_ALIGNMENT = 16
"""Bytes; a buffer's length is a multiple of it, so that it can be viewed in any dtype."""

_CODEC = Quantised(8)

_VECTOR = 64
"""Numbers that share a scale: the largest that divides the rows of most maps, so that no two layers share one."""

_MOST_VIEWS = 1024
"""Views that a buffer keeps; a network asks for a few hundred, and pictures of other sizes for others."""


@dataclass(frozen=True)
class Part:
    """What one layer sends on a lane at a displaced step, and what each rank there sends it for the same call.

    Sizes may differ and be 0, but what one rank sends is what the other expects: `sent` of the rank before on ``next``
    is `received` of this one on ``previous``.

    Attributes:
        dtype: as it is written and read; float32 if it is coded.
        coded: whether it travels in 8 bits a number and a byte for `_VECTOR` of them; to a neighbour only.
    """

    lane: Lane
    sent: tuple[int, ...]
    received: tuple[int, ...]
    dtype: torch.dtype
    coded: bool = False


class Slot:
    """One layer's place in a parcel.

    Attributes:
        outgoing: a tensor for each of the layer's parts, to be filled at once, before anything else is appended.
    """

    def __init__(
        self, post: Post, parcel: _Parcel, places: list[tuple[Part, int]], outgoing: list[torch.Tensor]
    ) -> None:
        self.outgoing = outgoing
        self._post, self._parcel, self._places = post, parcel, places

    def receive(self) -> list[tuple[Lane, torch.Tensor]]:
        """What came for each part, [P, *received], valid until `release`; empty where the parcel was dropped.

        Sends the parcel if it is open, and waits for it unless another layer has.

        Raises:
            ExchangeTimeout: naming the rank, the parcel's first layer and the step.
        """
        if not self._post.arrived(self._parcel):
            return []
        incoming = self._parcel.incoming
        return [(part.lane, incoming[part.lane].at(place, part.received, part)) for part, place in self._places]

    def release(self) -> None:
        """Have read it; the buffers are used again when all layers of the parcel have."""
        self._post.release(self._parcel)


class ParcelLayer(ABC):
    """What the exchange of every layer that appends to parcels has: its calls in this generation, and its slot."""

    def __init__(self) -> None:
        self.visits = 0
        self._receptions = 0  # of other ranks' tensors in this generation: two tell how they move
        self._slot: Slot | None = None

    def begin(self) -> None:
        """Start a generation."""
        self.visits = 0
        self._receptions = 0

    def drain(self) -> None:
        """Wait for what is under way, if anything is, and keep it."""
        slot, self._slot = self._slot, None
        if slot is not None:
            for lane, received in slot.receive():
                self._keep(lane, received)
            slot.release()

    @abstractmethod
    def _keep(self, lane: Lane, received: torch.Tensor) -> None:
        """Copy what came on a lane, [P, *shape]."""


class Post:
    """The parcels of one group of ranks. Every rank must make the same calls in the same order.

    Args:
        exchange: carries them.
        rooms: gives the room for what is needed for a moment only, on a device.
    """

    def __init__(self, exchange: Exchange, rooms: Callable[[torch.device], Workspace]) -> None:
        self._exchange, self._rooms = exchange, rooms
        self._open: _Parcel | None = None
        self._sent: list[_Parcel] = []
        self._free: list[_Parcel] = []
        # Bytes of the largest parcel so far. Parcels are used for any layers, so each grows to that once.
        self._largest: Sizes = Counter()

    @property
    def nbytes(self) -> int:
        """Bytes kept on the device."""
        opened = [] if self._open is None else [self._open]
        return sum(parcel.nbytes for parcel in (*opened, *self._sent, *self._free))

    def append(self, parts: Sequence[Part], step: int, kind: str, where: str, device: torch.device) -> Slot:
        """Room in the open parcel, after sending it where it is full or of an earlier step.

        Args:
            parts: of the layer; those of one lane in the same order on every rank.
            step: the step under way.
            kind: the counter that the bytes go to.
            where: "layer ... at step ..." for error messages.
            device: what the buffers are on.
        """
        if self._open is not None and (self._open.step != step or self._open.layers == LAYERS_PER_PARCEL):
            self.send()
        if self._open is None:
            self._open = self._free.pop() if self._free else _Parcel(self._exchange.group.world_size)
            self._open.start(step, where, self._rooms(device), self._largest)
        parcel = self._open
        places, outgoing = parcel.append(parts, kind)
        return Slot(self, parcel, places, outgoing)

    def send(self) -> None:
        """Send the open parcel, if there is one."""
        if self._open is not None:
            parcel, self._open = self._open, None
            self._sent.append(parcel)
            self._largest |= parcel.send(self._exchange)

    def drop(self) -> None:
        """Forget what was appended and not sent: at the end of a generation, where nobody will read it.

        A rank that raised may have appended less than the others, so it must not send what it has: messages of
        different sizes would meet.
        """
        self._open = None

    def arrived(self, parcel: _Parcel) -> bool:
        """Wait for a parcel, sending it first if it is open; False for one that was dropped.

        Raises:
            ExchangeTimeout: as `Slot.receive`. Whatever else is under way is given up, buffers too: it would not arrive
                either, and each parcel would be waited for until the timeout.
        """
        if parcel is self._open:
            self.send()
        if parcel not in self._sent:
            return False
        try:
            parcel.wait()
        except ExchangeTimeout:
            self._sent.clear()
            raise
        return True

    def release(self, parcel: _Parcel) -> None:
        """Count a layer that has read; the last one frees the buffers."""
        parcel.unread -= 1
        if parcel.unread == 0 and parcel in self._sent:
            self._sent.remove(parcel)
            self._free.append(parcel)

    def free(self) -> None:
        """Give the buffers back; nothing may be under way."""
        self._open = None
        self._sent.clear()
        self._free.clear()
        self._largest.clear()


class _Parcel:
    """What goes and comes on every lane, and who is in it; used again and again.

    Args:
        ranks: R.
    """

    def __init__(self, ranks: int) -> None:
        self.outgoing = {lane: _Mail(1) for lane in _LANES}
        self.incoming = {lane: _Mail(ranks if lane == "everybody" else 1) for lane in _LANES}
        self.step, self.layers, self.unread = -1, 0, 0
        self._shares: dict[Lane, Counter[str]] = {lane: Counter() for lane in _LANES}
        self._where = ""
        self._pending: list[Pending[torch.Tensor] | Pending[tuple[torch.Tensor, torch.Tensor]]] = []

    @property
    def nbytes(self) -> int:
        return sum(mail.nbytes for ways in (self.outgoing, self.incoming) for mail in ways.values())

    def start(self, step: int, where: str, room: Workspace, largest: Sizes) -> None:
        """Empty it for the layers of a step; `where` is the first one."""
        self.step, self.layers, self.unread, self._where = step, 0, 0, f"{where} and what is sent with it"
        self._room = room
        for lane in _LANES:
            self.outgoing[lane].start(room.device, largest["out", lane, "message"], largest["out", lane, "values"])
            self.incoming[lane].start(room.device, largest["in", lane, "message"], largest["in", lane, "values"])
            self._shares[lane].clear()

    def append(self, parts: Sequence[Part], kind: str) -> tuple[list[tuple[Part, int]], list[torch.Tensor]]:
        """Each part's place among what will come, and where to write what is sent."""
        places, outgoing = [], []
        for part in parts:
            mail, shares = self.outgoing[part.lane], self._shares[part.lane]
            place, size, padding = mail.reserve(part.sent, part)
            shares[kind] += size
            if padding:
                shares[PADDING] += padding
            outgoing.append(mail.at(place, part.sent, part)[0])
            places.append((part, self.incoming[part.lane].reserve(part.received, part)[0]))
        self.layers += 1
        self.unread += 1
        return places, outgoing

    def send(self, exchange: Exchange) -> Sizes:
        """Code what is to be coded, and start all messages; how large everything is."""
        sizes: Sizes = Counter()
        out, into = {}, {}
        for lane in _LANES:
            sent, received = self.outgoing[lane], self.incoming[lane]
            out[lane], into[lane] = sent.sealed(), received.sealed()
            sent.encode(self._room)
            sizes["out", lane, "message"], sizes["out", lane, "values"] = sent.sizes
            sizes["in", lane, "message"], sizes["in", lane, "values"] = received.sizes
        if out["everybody"].numel():
            # Displaced steps come after every warm-up and nothing but float32 moments goes here: one kind, no padding.
            ((kind, _),) = self._shares["everybody"].items()
            gathered = exchange.all_gather(out["everybody"][0], into["everybody"], kind, self._where)
            self._pending.append(gathered)
        shares = self._shares["previous"], self._shares["next"]
        if any(shares):
            fill = into["previous"][0], into["next"][0]
            self._pending.append(exchange.neighbours(out["previous"][0], out["next"][0], fill, shares, self._where))
        return sizes

    def wait(self) -> None:
        """Wait for all messages and decode them, the first time."""
        if not self._pending:
            return
        while self._pending:
            self._pending.pop().wait()
        for mail in self.incoming.values():
            mail.decode(self._room)


class _Mail:
    """What goes, or comes, on one lane: tensors as they are, and behind them the codes of all others.

    Args:
        ranks: P.
    """

    def __init__(self, ranks: int) -> None:
        self._message, self._values = _Buffer(ranks), _Buffer(ranks)
        self._codes = 0

    @property
    def nbytes(self) -> int:
        return self._message.nbytes + self._values.nbytes

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the message, and of the numbers that are coded in it before they are."""
        return self._message.used, self._values.used

    def start(self, device: torch.device, message: int, values: int) -> None:
        """Begin a new message, with room for so many bytes of each."""
        for buffer, size in ((self._message, message), (self._values, values)):
            buffer.start(device)
            buffer.fit(size)

    def reserve(self, shape: tuple[int, ...], part: Part) -> tuple[int, int, int]:
        """The place of a tensor in bytes, what it adds to the message, and what is added before it as padding."""
        if not part.coded:
            place, padding = self._message.reserve(shape, part.dtype)
            self._message.fit(self._message.used)
            return place, math.prod(shape) * part.dtype.itemsize, padding
        vectors = -(-math.prod(shape) // _VECTOR)
        place, _ = self._values.reserve((vectors, _VECTOR), torch.float32)
        self._values.fit(self._values.used)
        if vectors * _VECTOR != math.prod(shape):  # what nobody writes must not raise the last scale
            self._values.at(place, (vectors, _VECTOR), torch.float32)[0, -1].zero_()
        return place, _CODEC.size(vectors, _VECTOR), 0

    def at(self, place: int, shape: tuple[int, ...], part: Part) -> torch.Tensor:
        """The tensors at a place, [P, *shape]."""
        return (self._values if part.coded else self._message).at(place, shape, part.dtype)

    def sealed(self) -> torch.Tensor:
        """The message, uint8 [P, bytes]; nothing can be reserved any more."""
        self._codes, _ = self._message.reserve((_CODEC.size(self._vectors, _VECTOR),), torch.uint8)
        self._message.fit(self._message.used)
        return self._message.message()

    def encode(self, room: Workspace) -> None:
        """Write the codes."""
        if vectors := self._vectors:
            numbers = self._values.at(0, (vectors, _VECTOR), torch.float32)[0]
            _CODEC.encode(numbers, self._coded()[0], room)

    def decode(self, room: Workspace) -> None:
        """Read the codes."""
        if vectors := self._vectors:
            scales, codes = _CODEC.split(self._coded()[0], vectors, _VECTOR)
            numbers = self._values.at(0, (vectors, _VECTOR), torch.float32)[0]
            torch.mul(_CODEC.levels(codes, _VECTOR, room), _CODEC.scales(scales)[:, None], out=numbers)

    @property
    def _vectors(self) -> int:
        """V."""
        return self._values.used // (_VECTOR * torch.float32.itemsize)

    def _coded(self) -> torch.Tensor:
        return self._message.at(self._codes, (_CODEC.size(self._vectors, _VECTOR),), torch.uint8)


@dataclass
class _Buffer:
    """A growing buffer of bytes for one message to each or from each of P ranks, filled place by place.

    Attributes:
        ranks: P.
        used: bytes of one message so far.
    """

    ranks: int
    used: int = 0
    _bytes: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    # Views by place: the same layers ask at every step, and making one takes longer than copying into it.
    _views: dict[tuple[object, ...], torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self._bytes.nbytes

    def start(self, device: torch.device) -> None:
        """Begin a new message."""
        self.used = 0
        if self._bytes.device != device:
            self._replace(torch.empty(0, dtype=torch.uint8, device=device))

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
        """The place of a tensor in the message, in bytes, and the bytes before it that are padding."""
        size = math.prod(shape) * dtype.itemsize
        padding = -self.used % dtype.itemsize if size else 0
        place = self.used + padding
        self.used = place + size
        return place, padding

    def fit(self, size: int) -> None:
        """Make room for messages of `size` bytes; what is there stays."""
        needed = -(-self.ranks * size // _ALIGNMENT) * _ALIGNMENT
        if needed > self._bytes.numel():
            larger = self._bytes.new_empty(needed)
            larger[: self._bytes.numel()] = self._bytes
            self._replace(larger)

    def at(self, place: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensors of all P messages at a place, [P, *shape]."""
        key = (place, self.used if self.ranks > 1 else 0, shape, dtype)
        found = self._views.get(key)
        if found is None:
            whole = self._bytes.view(dtype)
            strides = (self.used // dtype.itemsize, *(math.prod(shape[dim + 1 :]) for dim in range(len(shape))))
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            found = whole.as_strided((self.ranks, *shape), strides, place // dtype.itemsize)
            self._views[key] = found
        return found

    def message(self) -> torch.Tensor:
        """What has been reserved, uint8 [P, used]."""
        return self._bytes[: self.ranks * self.used].view(self.ranks, self.used)

    def _replace(self, larger: torch.Tensor) -> None:
        self._bytes = larger
        self._views.clear()
