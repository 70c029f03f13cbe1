"""`Relay`: how rank 0 tells the other ranks what to do, through the store in which they found each other.

A rank that waits for work waits for a key, not in a collective, so a server may idle for as long as it likes. Torch's
store takes values of 8 MiB at most, so that messages go in parts.
"""

from __future__ import annotations

import time
from collections import deque
from datetime import timedelta
from typing import Any, cast

from otil_xdit.comm.store import Store, own_connection, read

PART_BYTES = 4 << 20
"""Of a message under one key; the store's limit is 8 MiB."""

IDLE_WAIT = timedelta(days=1)
"""How long one wait for work is; it begins again then."""

LOOKAHEAD = 2
"""Steps ahead for which rank 0 says whether to go on: ranks are hardly further apart, so nobody waits for its word."""

_PREFIX = "otil-xdit serve"


class Relay:
    """One rank's end.

    Args:
        store: where the ranks found each other; a connection of its own is made.
        rank, world_size: of all ranks.

    Attributes:
        number: of the message that came last.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store = cast(Any, own_connection(store))
        self._rank, self._world_size = rank, world_size
        self.number = 0
        self._keys: deque[tuple[int, str]] = deque()

    # ---- work ------------------------------------------------------------------------------------------------------

    def publish(self, message: bytes) -> None:
        """Hand the next message to all other ranks; for rank 0."""
        self._forget_before(self.number)
        self.number += 1
        if self._world_size > 1:
            self._put("work", message)

    def receive(self) -> bytes:
        """Wait for the next message, however long that takes."""
        self.number += 1
        return self._take("work", None)

    def hand_over(self, data: bytes) -> None:
        """Leave this rank's image for rank 0."""
        self._put("image", data)

    def take_over(self, seconds: float) -> bytes:
        """Return the image that another rank has left.

        Raises:
            RuntimeError: when it does not come within `seconds`.
        """
        return self._take("image", timedelta(seconds=seconds))

    def exchange(self, name: str, value: str, seconds: float) -> list[str]:
        """Return the values of all ranks, by rank, for this message.

        Raises:
            RuntimeError: when one does not come within `seconds`.
        """
        self._store.set(self._key(f"{name}/{self._rank}"), value)
        keys = [self._key(f"{name}/{rank}") for rank in range(self._world_size)]
        self._store.wait(keys, timedelta(seconds=seconds))
        return [self._store.get(key).decode() for key in keys]

    # ---- steps -----------------------------------------------------------------------------------------------------

    def decide(self, step: int, is_last: bool) -> None:
        """Say whether all ranks stop after that step; for rank 0."""
        key = self._key(f"step/{step}")
        self._store.set(key, "stop" if is_last else "go")
        self._keys.append((self.number, key))

    def is_last(self, step: int, seconds: float) -> bool:
        """Return what rank 0 has decided of that step.

        Raises:
            RuntimeError: when it says nothing within `seconds`.
        """
        key = self._key(f"step/{step}")
        self._store.wait([key], timedelta(seconds=seconds))
        return bool(self._store.get(key) == b"stop")

    # ---- the store -------------------------------------------------------------------------------------------------

    def _put(self, name: str, data: bytes) -> None:
        parts = [data[start : start + PART_BYTES] for start in range(0, len(data), PART_BYTES)] or [b""]
        for number, part in enumerate(parts):
            key = self._key(f"{name}/{number}")
            self._store.set(key, part)
            self._keys.append((self.number, key))
        self._store.set(self._key(name), str(len(parts)))
        self._keys.append((self.number, self._key(name)))

    def _take(self, name: str, limit: timedelta | None) -> bytes:
        key = self._key(name)
        while True:
            begun = time.monotonic()
            try:
                self._store.wait([key], limit or IDLE_WAIT)
                break
            except RuntimeError:  # also of a store that is gone, at once
                if limit is not None or time.monotonic() - begun < IDLE_WAIT.total_seconds() / 2:
                    raise
        return b"".join(self._store.get(f"{key}/{number}") for number in range(int(self._store.get(key))))

    def _key(self, name: str) -> str:
        return f"{_PREFIX}/{self.number}/{name}"

    def _forget_before(self, number: int) -> None:
        """Delete what this rank wrote before that message: all ranks have done with it."""
        while self._keys and self._keys[0][0] < number:
            self._store.delete_key(self._keys.popleft()[1])


class Heartbeat:
    """What a rank says of itself while it lives, in the store, and what rank 0 reads there of the others.

    Args:
        store: as for `Relay`.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store = own_connection(store)
        self._rank, self._others = rank, [other for other in range(world_size) if other != rank]
        self._beats = 0
        self._seen: dict[int, tuple[bytes, float]] = {}

    def beat(self, where: str) -> None:
        """Say that this rank lives, and at which layer and step it is."""
        self._beats += 1
        self._store.set(f"{_PREFIX}/beat/{self._rank}", f"{self._beats}|{where}")

    def others(self) -> dict[int, tuple[float, str]]:
        """Return for every other rank the seconds since it last said something, and where it was."""
        now = time.monotonic()
        for rank in self._others:
            said = read(self._store, f"{_PREFIX}/beat/{rank}") or b""
            if rank not in self._seen or self._seen[rank][0] != said:
                self._seen[rank] = (said, now)
        return {rank: (now - at, said.decode().partition("|")[2]) for rank, (said, at) in self._seen.items()}
