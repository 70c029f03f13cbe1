"""`FailureDetector`: what the ranks of one image tell each other besides the collectives: who failed, and where.

A wait that fails says only that somebody did not answer. So the ranks also talk through the store in which they found
each other at the start (torchrun's, or rank 0's). During a generation a thread of each rank looks there every
`POLL_SECONDS` for an alarm, and leaves a note of how far it is. A rank that fails by itself, or whose wait fails,
writes what it knows, raises the alarm and breaks its connections, so that nobody waits for the timeout; every other
rank's thread answers with where it is and does the same. Who has written nothing is the one that died or hangs.

All talk with the store happens in that thread: a store on a stopped machine may never answer, and whoever asks must be
able to go on. Nothing here runs on a device, and a step costs the main thread nothing but an assignment a message.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeVar

from otil_xdit.comm.store import POLL_SECONDS, STORE_SECONDS, Store, _own_connection
from otil_xdit.errors import ExchangeTimeout

T = TypeVar("T")

_START = "the start of the generation"


ANSWER_SECONDS = 1.5
"""What a rank that looks for the culprit gives the others to say where they are: a few polls."""

GRACE_SECONDS = 2.0
"""What a rank that raised gives the others to raise alike or to finish, before it breaks the connections."""


@dataclass(frozen=True)
class PeerStatus:
    """Where a rank is in a generation.

    Attributes:
        kind: what it does there.
        where: the last message that it began, "layer ... at step ...".
        calls: messages begun since the generation's start; the same number on two ranks is the same place.
        error: what it failed with; empty unless it failed by itself.
        order: that of a `NotFinite`.
    """

    kind: Literal["waits", "computes", "failed", "done"]
    where: str
    calls: int
    error: str = ""
    order: tuple[int, int] | None = None

    @classmethod
    def of(cls, text: bytes) -> PeerStatus:
        values = json.loads(text)
        return cls(**{**values, "order": values["order"] and tuple(values["order"])})

    def __str__(self) -> str:
        if self.kind == "done":
            return "is done"
        if self.kind == "failed":
            return f"failed: {self.error} (after {self.where})"
        return f"{'waits for' if self.kind == 'waits' else 'computes after'} {self.where}"


class FailureDetector:
    """One session's talk with the other ranks of its images.

    Args:
        name: the session's; the same on its ranks, and no other session's.
        groups: name of the connections that the session shares with others: who breaks them breaks those, too.
        ranks: all ranks that work on one image, by their global number.
        rank: this one.
        timeout: seconds that a rank waits for the others to begin a generation.
        store: where the ranks found each other; `FailureDetector` uses a connection of its own to it.
        host: who keeps it, for messages.
        sever: breaks this rank's connections, so that every wait on them, here and there, ends at once.
    """

    def __init__(
        self,
        name: str,
        groups: str,
        ranks: Sequence[int],
        rank: int,
        timeout: float,
        store: Store,
        host: str,
        sever: Callable[[], None],
    ) -> None:
        self.rank, self.timeout = rank, timeout
        self.where, self.calls, self.waiting = _START, 0, False
        self.generation = 0
        self.why_broken = ""
        self._name, self._broken_key = name, f"otil/broken/{groups}"
        self._others = [other for other in ranks if other != rank]
        self._store, self._host, self._sever = store, host, sever
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._polling = self._store_is_silent = False
        self._alarmed_in = 0

    # ---- a generation ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a generation.

        Raises:
            ExchangeTimeout: when an earlier one broke the connections.
        """
        self._refuse(self.why_broken)
        if self._thread is None:
            self._store = _own_connection(self._store)
            self._thread = threading.Thread(target=self._talk, name="otil-xdit watch", daemon=True)
            self._thread.start()
        self.generation += 1
        self.where, self.calls, self.waiting = _START, 0, False
        self._polling = True
        self._jobs.put(lambda: None)

    def on_collective(self, where: str) -> None:
        """A message has been begun, "layer ... at step ..."."""
        self.where = where
        self.calls += 1

    def done(self) -> None:
        """The generation ended, and nothing of it is under way."""
        self._polling = False
        self._jobs.put(partial(self._write, self.generation, self._note("done")))

    def failed(self, error: BaseException) -> dict[int, PeerStatus]:
        """This rank leaves the generation with an exception of its own.

        Where the others do the same at the same place, or have finished, all may go on to the next generation.
        Otherwise they wait for this rank: after `GRACE_SECONDS` their connections are broken.

        Returns:
            What the others wrote, by rank.
        """
        if self.why_broken:
            return {}
        mine = self._note("failed", _described(error), getattr(error, "order", None))
        self._asked(partial(self._write, self.generation, mine))
        over = time.monotonic() + min(GRACE_SECONDS, self.timeout)
        while True:
            notes = self._notes()
            settled = all(other in notes and notes[other].kind in ("failed", "done") for other in self._others)
            self._asked(self._look)
            if settled or self.is_alarmed or self._store_is_silent or time.monotonic() > over:
                break
            time.sleep(0.01)
        self._polling = False
        if not settled or any(note.kind == "failed" and note.calls != mine.calls for note in notes.values()):
            with _sigterm_held_back() as held:
                self._give_up(mine, f"rank {self.rank} {mine}")
                notes = self._answers()
                self._leave_last(notes)
                if held:
                    print(f"rank {self.rank} {mine}", file=sys.stderr, flush=True)
        return notes

    def diagnose(self) -> str:
        """A wait of this rank failed: break everybody's connections, and find out who is to blame.

        Returns:
            "rank 1 failed: ..." or the like, from what the others wrote.
        """
        if self.why_broken:
            return self.why_broken
        with _sigterm_held_back() as held:
            mine = self._note("waits")
            self._give_up(mine, f"rank {self.rank} {mine}")
            self._polling = False
            notes = self._answers()
            self.why_broken = self._verdict(notes)
            self._leave_last(notes)
            if held:
                # torchrun ends every rank when one has died; what this one knows must be said before.
                print(f"rank {self.rank} stops at {self.where}: {self.why_broken}", file=sys.stderr, flush=True)
        return self.why_broken

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread = None

    @property
    def is_alarmed(self) -> bool:
        """Whether another rank raised the alarm in this generation."""
        return self._alarmed_in == self.generation

    # ---- agreement -------------------------------------------------------------------------------------------------

    def exchange_facts(self, facts: Mapping[str, str]) -> dict[int, dict[str, str]]:
        """Every rank's facts for this generation, by rank; waits until all have begun it.

        Raises:
            ExchangeTimeout: when a rank does not come, or has given up.
        """
        keys = {other: self._key(other, "facts") for other in self._others}
        self._asked(lambda: self._store.set(self._key(self.rank, "facts"), json.dumps(dict(facts))))
        over = time.monotonic() + self.timeout
        while (found := self._asked(lambda: self._gathered(keys))) is None:
            if self.is_alarmed or self._store_is_silent:
                raise ExchangeTimeout(f"rank {self.rank}: before the first step: {self.diagnose()}")
            self._refuse((self._asked(lambda: self._read(self._broken_key)) or b"").decode())
            if time.monotonic() > over:
                raise ExchangeTimeout(f"rank {self.rank}: {self._miss(keys)}")
        self._jobs.put(self._forget_last)
        return {self.rank: dict(facts), **found}

    def _miss(self, keys: Mapping[int, str]) -> str:
        """Give up waiting for ranks that have not begun."""
        come = self._asked(lambda: [other for other, key in keys.items() if self._store.check([key])]) or []
        missing = [str(other) for other in keys if other not in come]
        reason = (
            f"rank {', '.join(missing)} did not begin generation {self.generation} within {self.timeout:g} s: "
            "busy with something else, dead or stopped"
        )
        self._give_up(self._note("waits"), reason)
        self._polling = False
        return reason

    # ---- what happens in the thread --------------------------------------------------------------------------------

    def _talk(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=POLL_SECONDS if self._polling else None)
            except Empty:
                job = self._look
            if job is None:
                return
            with suppress(RuntimeError):  # a store that is gone; whoever asked finds no answer
                job()

    def _look(self) -> None:
        """Say how far this rank is; after an alarm, answer it."""
        at = self.generation  # the main thread may go on to the next meanwhile
        self._store.set(self._key(self.rank, "at", at=at), self.where)
        if self._alarmed_in != at and self._store.check([self._key("alarm", at=at)]):
            self._alarmed_in = at
            if not self._store.check([self._key(self.rank, at=at)]):
                self._write(at, self._note("waits" if self.waiting else "computes"))
            self._sever()

    def _gathered(self, keys: Mapping[int, str]) -> dict[int, dict[str, str]] | None:
        """What stands under all keys; None while one is missing, after a poll's time."""
        try:
            self._store.wait(list(keys.values()), timedelta(seconds=POLL_SECONDS))
        except RuntimeError:
            self._look()
            return None
        return {other: json.loads(self._store.get(key)) for other, key in keys.items()}

    def _read(self, key: str) -> bytes | None:
        return self._store.get(key) if self._store.check([key]) else None

    def _write(self, at: int, note: PeerStatus) -> None:
        self._store.set(self._key(self.rank, at=at), json.dumps(asdict(note)))

    def _forget_last(self) -> None:
        """Everybody has begun this generation, so nobody reads any more what was written in the last."""
        for what in ((), ("facts",), ("at",)):
            with suppress(RuntimeError):
                self._store.delete_key(self._key(self.rank, *what, at=self.generation - 1))

    # ---- what asks the thread --------------------------------------------------------------------------------------

    def _asked(self, job: Callable[[], T]) -> T | None:
        """What `job` gives in the thread; None where the store does not answer."""
        answered, found = threading.Event(), []

        def run() -> None:
            try:
                found.append(job())
            finally:
                answered.set()

        if self._store_is_silent:
            return None
        self._jobs.put(run)
        if not answered.wait(STORE_SECONDS) or not found:
            self._store_is_silent = True
            return None
        return found[0]

    def _note(
        self, kind: Literal["waits", "computes", "failed", "done"], error: str = "", order: Any = None
    ) -> PeerStatus:
        return PeerStatus(kind, self.where, self.calls, error, order)

    def _notes(self) -> dict[int, PeerStatus]:
        """What the others have written so far."""
        found = self._asked(lambda: {other: self._read(self._key(other)) for other in self._others})
        return {other: PeerStatus.of(text) for other, text in (found or {}).items() if text is not None}

    def _give_up(self, mine: PeerStatus, reason: str) -> None:
        """No more generations: tell the others, and end their waits."""
        self.why_broken = reason
        self._asked(partial(self._write, self.generation, mine))
        self._asked(lambda: self._store.set(self._key("alarm"), ""))
        self._asked(lambda: self._store.set(self._broken_key, reason))
        self._sever()

    def _answers(self) -> dict[int, PeerStatus]:
        """What the others write after an alarm, as far as they do."""
        over = time.monotonic() + ANSWER_SECONDS
        while True:
            notes = self._notes()
            # Who computes has not noticed yet. It should be able to say so before this process ends, as torchrun ends
            # all others then.
            noticed = len(notes) == len(self._others) and all(note.kind != "computes" for note in notes.values())
            if noticed or self._store_is_silent or time.monotonic() > over:
                return notes
            time.sleep(0.02)

    def _leave_last(self, notes: Mapping[int, PeerStatus]) -> None:
        """Wait until all who answered know who is to blame: with this process the store may go, and torchrun ends all
        others."""
        over = time.monotonic() + ANSWER_SECONDS
        self._asked(lambda: self._store.set(self._key(self.rank, "knows"), ""))
        keys = [self._key(other, "knows") for other in notes if notes[other].kind != "done"]
        while keys and not self._asked(lambda: self._store.check(keys)):
            if self._store_is_silent or time.monotonic() > over:
                return
            time.sleep(0.02)

    def _verdict(self, notes: Mapping[int, PeerStatus]) -> str:
        silent = [other for other in self._others if other not in notes]
        if self._store_is_silent:
            return f"{self._host}, which keeps the ranks' store, does not answer: it has died, hangs or is stopped"
        culprits = [f"rank {other} {note}" for other, note in notes.items() if note.kind == "failed"]
        for other in silent:
            at = self._asked(partial(self._read, self._key(other, "at")))
            culprits.append(
                f"rank {other} says nothing, so it has died, hangs or is stopped (last seen at "
                f"{'the start' if at is None else at.decode()})"
            )
        return "; ".join(culprits or [f"rank {other} {note}" for other, note in notes.items()])

    def _refuse(self, reason: str) -> None:
        if reason:
            raise ExchangeTimeout(
                f"rank {self.rank}: the ranks gave up their connections in an earlier generation ({reason}); "
                "start all processes again"
            )

    def _key(self, *what: object, at: int | None = None) -> str:
        generation = self.generation if at is None else at
        return "/".join(["otil", self._name, str(generation), *map(str, what)])


@contextmanager
def _sigterm_held_back() -> Iterator[list[int]]:
    """SIGTERM within is noted in the list, and takes effect at the end."""
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield held
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: held.append(number))
    try:
        yield held
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
        if held:
            signal.raise_signal(signal.SIGTERM)


def _described(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
