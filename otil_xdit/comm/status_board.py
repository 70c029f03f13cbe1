"""`StatusBoard`: what the ranks of one session write in the store about a generation, and read of each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from otil_xdit.comm.peer_status import PeerStatus
from otil_xdit.comm.store import POLL_SECONDS, Store, StoreThread, read, wait_for_keys


class StatusBoard:
    """The keys of one session in the store; those of a generation bear its number.

    Methods that take a `Store` are jobs of the store's thread; all others may be called from any other thread.

    Args:
        name: the session's; the same on its ranks, and no other session's.
        groups: name of the connections that the session shares with others.
        ranks: all ranks that work on one image, by their global number.
        rank: this one.
        store: where the ranks found each other.
        on_poll, patience: see `StoreThread`.

    Attributes:
        generation: number of the generation under way, from 1.
        others: all ranks but this one.
    """

    def __init__(
        self,
        name: str,
        groups: str,
        ranks: Sequence[int],
        rank: int,
        store: Store,
        on_poll: Callable[[Store], None],
        patience: float,
    ) -> None:
        self.generation, self._forgotten = 0, 0
        self.others = [other for other in ranks if other != rank]
        self._rank, self._name, self._broken_key = rank, name, f"otil/broken/{groups}"
        self._on_poll = on_poll
        self._thread = StoreThread(store, on_poll, patience)
        self.close, self.stop_polling, self.hurry = self._thread.close, self._thread.stop_polling, self._thread.hurry

    @property
    def is_silent(self) -> bool:
        """Whether the store has stopped to answer."""
        return self._thread.is_silent

    def begin(self) -> None:
        """Begin the next generation, and poll."""
        self.generation += 1
        self._thread.start_polling()

    def poll(self) -> None:
        """Poll at once, and wait for it."""
        self._thread.ask(self._on_poll)

    # ---- statuses ------------------------------------------------------------------------------------------------

    def post(self, status: PeerStatus, wait: bool = True) -> None:
        """Write this rank's status.

        Args:
            wait: whether to wait until it is written.
        """
        key, text = self._key(self._rank), status.to_json()
        (self._thread.ask if wait else self._thread.submit)(lambda store: store.set(key, text))

    def statuses(self) -> dict[int, PeerStatus]:
        """Return what the others have written so far, by rank."""
        keys = {other: self._key(other) for other in self.others}
        found = self._thread.ask(lambda store: {other: read(store, key) for other, key in keys.items()})
        return {other: PeerStatus.from_json(text) for other, text in (found or {}).items() if text is not None}

    def last_seen(self, rank: int) -> str:
        """Return the place that a rank wrote at its last poll."""
        at = self._thread.ask(lambda store: read(store, self._key(rank, "at")))
        return "the start" if at is None else at.decode()

    def acknowledge(self) -> None:
        """Write that this rank knows who is to blame."""
        self._thread.ask(lambda store: store.set(self._key(self._rank, "knows"), ""))

    def have_acknowledged(self, ranks: Collection[int]) -> bool:
        """Return whether all of `ranks` know who is to blame."""
        keys = [self._key(rank, "knows") for rank in ranks]
        return not keys or bool(self._thread.ask(lambda store: store.check(keys)))

    # ---- the alarm -----------------------------------------------------------------------------------------------

    def raise_alarm(self, reason: str) -> None:
        """Have all ranks give up this generation, and refuse later ones because of `reason`."""
        self._thread.ask(lambda store: store.set(self._key("alarm"), ""))
        self._thread.ask(lambda store: store.set(self._broken_key, reason))

    def set_alarm(self, store: Store, generation: int, reason: str) -> None:
        """Do what `raise_alarm` does, in the store's thread."""
        store.set(self._key("alarm", generation=generation), "")
        store.set(self._broken_key, reason)

    def why_broken(self) -> str:
        """Return why a session gave up the connections; empty while none did."""
        return (self._thread.ask(lambda store: read(store, self._broken_key)) or b"").decode()

    def write_place(self, store: Store, generation: int, where: str) -> None:
        """Write how far this rank is."""
        store.set(self._key(self._rank, "at", generation=generation), where)

    def has_alarm(self, store: Store, generation: int) -> bool:
        """Return whether a rank raised the alarm."""
        return store.check([self._key("alarm", generation=generation)])

    def answer_alarm(self, store: Store, generation: int, status: PeerStatus) -> None:
        """Write this rank's status where it has written none."""
        key = self._key(self._rank, generation=generation)
        if not store.check([key]):
            store.set(key, status.to_json())

    # ---- facts ---------------------------------------------------------------------------------------------------

    def post_facts(self, facts: Mapping[str, str]) -> None:
        """Write this rank's facts for this generation, and that it waits for the others'."""

        def post(store: Store) -> None:
            store.set(self._key(self._rank, "facts"), json.dumps(dict(facts)))
            store.set(_turn_of(self._rank), self._key())

        self._thread.ask(post)

    def wait_no_more(self) -> None:
        """Write that this rank does not wait for facts any more."""
        self._thread.submit(lambda store: store.set(_turn_of(self._rank), ""))

    def rank_elsewhere(self) -> int | None:
        """Return a lower rank that waits for facts of another session's generation, which this rank has not begun.

        Both would wait for ever. Only the higher one of two is told, so that one of the two generations goes on.
        """

        def find(store: Store) -> int | None:
            for other in self.others:
                turn = (read(store, _turn_of(other)) or b"").decode() if other < self._rank else ""
                is_elsewhere = bool(turn) and turn.rpartition("/")[0] != self._key().rpartition("/")[0]
                if is_elsewhere and not store.check([f"{turn}/{self._rank}/facts"]):
                    return other
            return None

        return self._thread.ask(find)

    def facts(self) -> dict[int, dict[str, str]] | None:
        """Return the others' facts by rank; None while a rank's are missing, after a poll's time."""
        keys = {other: self._key(other, "facts") for other in self.others}

        def gather(store: Store) -> dict[int, dict[str, str]] | None:
            if not wait_for_keys(store, list(keys.values()), POLL_SECONDS):
                self._on_poll(store)
                return None
            return {other: json.loads(store.get(key)) for other, key in keys.items()}

        return self._thread.ask(gather)

    def ranks_without_facts(self) -> list[int]:
        """Return the ranks that have not begun this generation."""
        come = self._thread.ask(
            lambda store: [other for other in self.others if store.check([self._key(other, "facts")])]
        )
        return [other for other in self.others if other not in (come or [])]

    def facts_of_anyone(self) -> dict[str, str] | None:
        """Return the facts of the first of the other ranks that has begun this generation; None where none has."""
        keys = [self._key(other, "facts") for other in self.others]
        found = self._thread.ask(lambda store: [text for key in keys if (text := read(store, key)) is not None][:1])
        return None if not found else dict(json.loads(found[0]))

    def outcome(self) -> str:
        """Return what `settle` has made of this generation; empty where it is still open."""
        return (self._thread.ask(lambda store: read(store, self._key("outcome"))) or b"").decode()

    def settle(self, outcome: str) -> str:
        """Write what becomes of this generation, unless another rank has; return what stands there now."""
        key = self._key("outcome")
        return (self._thread.ask(lambda store: store.compare_set(key, "", outcome)) or b"").decode()

    def forget_last_generations(self) -> None:
        """Delete what this rank wrote in earlier ones; all have begun this one, so nobody reads it any more."""
        past, self._forgotten = range(self._forgotten + 1, self.generation), self.generation - 1
        written = ((self._rank,), (self._rank, "facts"), (self._rank, "at"), ("outcome",))

        def delete(store: Store) -> None:
            for generation in past:
                for what in written:
                    with suppress(RuntimeError):
                        store.delete_key(self._key(*what, generation=generation))

        self._thread.submit(delete)

    def _key(self, *what: object, generation: int | None = None) -> str:
        number = self.generation if generation is None else generation
        return "/".join(["otil", self._name, str(number), *map(str, what)])


def _turn_of(rank: int) -> str:
    """Return the key under which a rank writes which generation of which session it waits in; all sessions share it."""
    return f"otil/turn/{rank}"
