"""`FailureDetector`: what the ranks of one image tell each other besides the collectives: who failed, and where.

A wait that fails says only that somebody did not answer. So the ranks also talk through the store in which they found
each other at the start (torchrun's, or rank 0's). During a generation a thread of each rank polls it for an alarm, and
writes how far the rank is. A rank that fails by itself, or whose wait fails, writes its status, raises the alarm and
breaks its connections, so that nobody waits for the timeout; every other rank's thread answers with its own status and
does the same. A rank that has written nothing is the one that died or hangs.

Messages of a device are not waited for by the host. The thread that polls also looks for how long the oldest of them
has been under way (`otil_xdit.comm.deadlines`), and raises the alarm where it takes longer than the timeout.

Nothing here runs on a device, and a step costs the main thread little more than an assignment a message.

Over 300 lines, half of them documentation: what ranks tell each other and what follows from it is one protocol.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from otil_xdit.comm.deadlines import Deadlines, Reached, Transfer
from otil_xdit.comm.peer_status import PeerStatus, StatusKind, describe_culprits, describe_error
from otil_xdit.comm.rendezvous import START, Rendezvous
from otil_xdit.comm.status_board import StatusBoard
from otil_xdit.comm.store import Store
from otil_xdit.errors import ExchangeTimeout, NotFinite

ANSWER_SECONDS = 1.5
"""How long a rank that looks for the culprit waits for the others' statuses: a few polls."""

GRACE_SECONDS = 2.0
"""How long a rank that raised waits for the others to raise alike or to finish, before it breaks the connections."""


class FailureDetector:
    """One session's talk with the other ranks of its images.

    Over 200 lines: who may go on, who is to blame and what is told to whom follow from one another in a generation.

    Args:
        name: the session's; the same on its ranks, and no other session's.
        groups: name of the connections that the session shares with others: who breaks them breaks those, too.
        ranks: all ranks that work on one image, by their global number.
        rank: this one.
        timeout: seconds that a rank waits for the others to begin a generation, for the store where nothing has failed,
            and for a message of a device.
        store: where the ranks found each other; `FailureDetector` uses a connection of its own to it.
        host: who keeps it, for messages.
        sever: breaks this rank's connections, so that every wait on them, here and there, ends at once.

    Attributes:
        where: the last message that this rank began.
        times: how often it has begun that message in this generation.
        waiting: whether it waits for one; set by the collectives.
        why_broken: why the connections were given up; empty while they were not.
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
        self.where, self.times, self.waiting = START, 0, False
        self.why_broken = ""
        self._begun: Counter[str] = Counter()
        self._board = StatusBoard(name, groups, ranks, rank, store, self._poll, timeout)
        self._rendezvous = Rendezvous(self._board, rank, timeout, self._check_before_first_step)
        self._host, self._sever = host, sever
        self._alarmed_in = 0
        self._deadlines = Deadlines(timeout)
        self._overdue = ""

    # ---- a generation ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a generation.

        Raises:
            ExchangeTimeout: when an earlier one broke the connections.
        """
        self._check_not_broken(self.why_broken)
        self.where, self.times, self.waiting = START, 0, False
        self._begun.clear()
        self._overdue = ""
        self._deadlines.clear()
        self._board.begin()

    def on_collective(self, where: str) -> None:
        """Record that a message has been begun, "layer ... at step ..."."""
        self._begun[where] += 1
        self.where, self.times = where, self._begun[where]

    def on_enqueued(self, reached: Reached, works: Sequence[Transfer]) -> None:
        """Watch the message that has been begun last, for which the host does not wait; see `Deadlines.watch`."""
        self._deadlines.watch(self.where, reached, works)

    def done(self) -> None:
        """Record that the generation ended, and nothing of it is under way."""
        self._board.stop_polling()
        self._board.post(self._status("done"), wait=False)

    def failed(self, error: BaseException) -> dict[int, PeerStatus]:
        """Tell the others that this rank leaves the generation with an exception of its own.

        Where the others do the same at the same place, or have finished, all may go on to the next generation.
        Otherwise they wait for this rank: after `GRACE_SECONDS` their connections are broken.

        Returns:
            The others' statuses, by rank.
        """
        if self.why_broken:
            return {}
        order = error.order if isinstance(error, NotFinite) else None
        own = PeerStatus("failed", self.where, self.times, describe_error(error), order)
        self._board.post(own)
        statuses, all_left = self._wait_until_all_left()
        self._board.stop_polling()
        if not all_left or any(peer.kind == "failed" and not peer.is_at(own) for peer in statuses.values()):
            with _sigterm_held_back() as held:
                self._give_up(own, f"rank {self.rank} {own}")
                statuses = _collect_answers(self._board)
                _wait_for_acknowledgements(self._board, statuses)
                if held:
                    print(f"rank {self.rank} {own}", file=sys.stderr, flush=True)
        return statuses

    def diagnose(self) -> str:
        """Break everybody's connections after a wait of this rank failed, and find out who is to blame.

        Returns:
            "rank 1 failed: ..." or the like, from what the others wrote.
        """
        if self.why_broken:
            return self.why_broken
        with _sigterm_held_back() as held:
            own = self._status("waits")
            self._give_up(own, f"rank {self.rank} {own}")
            self._board.stop_polling()
            statuses = _collect_answers(self._board)
            self.why_broken = self._verdict(statuses)
            _wait_for_acknowledgements(self._board, statuses)
            if held:
                # torchrun ends every rank when one has died; what this one knows must be said before.
                print(f"rank {self.rank} stops at {self.where}: {self.why_broken}", file=sys.stderr, flush=True)
        return self.why_broken

    def close(self) -> None:
        """End the thread that talks with the store."""
        self._board.close()

    @property
    def is_alarmed(self) -> bool:
        """Return whether another rank raised the alarm in this generation."""
        return self._alarmed_in == self._board.generation  # by this one's own overdue message, too

    # ---- agreement -------------------------------------------------------------------------------------------------

    def exchange_facts(self, facts: Mapping[str, str]) -> dict[int, dict[str, str]]:
        """Return every rank's facts for this generation, by rank; wait until all have begun it.

        Raises:
            PipelineBusyError: see `Rendezvous.meet`.
            ExchangeTimeout: when a rank fails meanwhile, or has given the connections up.
        """
        return self._rendezvous.meet(facts)

    def _check_before_first_step(self) -> None:
        """Raise `ExchangeTimeout` where nobody need be waited for any more."""
        if self.is_alarmed or self._board.is_silent:
            raise ExchangeTimeout(f"rank {self.rank}: before the first step: {self.diagnose()}")
        self._check_not_broken(self._board.why_broken())

    # ---- the parts of it -------------------------------------------------------------------------------------------

    def _poll(self, store: Store) -> None:
        """Write how far this rank is; answer an alarm. Runs in the store's thread."""
        at = self._board.generation  # the main thread may go on to the next meanwhile
        self._board.write_place(store, at, self.where)
        if self._alarmed_in != at and self._board.has_alarm(store, at):
            self._alarmed_in = at
            self._board.answer_alarm(store, at, self._status("waits" if self.waiting else "computes"))
            self._sever()
        overdue = None if self._alarmed_in == at else self._deadlines.overdue()
        if overdue is not None:
            self._overdue, self._alarmed_in = overdue, at
            own = self._status("waits")
            self._board.answer_alarm(store, at, own)
            self._board.set_alarm(store, at, f"rank {self.rank} {own}")
            self._sever()

    def _status(self, kind: StatusKind) -> PeerStatus:
        return PeerStatus(kind, self._overdue or self.where, self.times)

    def _give_up(self, own: PeerStatus, reason: str) -> None:
        """Allow no more generations: tell the others, and end their waits."""
        self.why_broken = reason
        self._board.hurry()
        self._board.post(own)
        self._board.raise_alarm(reason)
        self._sever()

    def _wait_until_all_left(self) -> tuple[dict[int, PeerStatus], bool]:
        """Wait for the others to fail or to finish, or for a reason to wait no more.

        Returns:
            The others' statuses by rank, and whether all have failed or finished.
        """
        board, deadline = self._board, time.monotonic() + min(GRACE_SECONDS, self.timeout)
        while True:
            statuses = board.statuses()
            all_left = all(other in statuses and statuses[other].kind in ("failed", "done") for other in board.others)
            board.poll()
            if all_left or self.is_alarmed or board.is_silent or time.monotonic() > deadline:
                return statuses, all_left
            time.sleep(0.01)

    def _verdict(self, statuses: Mapping[int, PeerStatus]) -> str:
        if self._board.is_silent:
            return f"{self._host}, which keeps the ranks' store, does not answer: it has died, hangs or is stopped"
        silent = [other for other in self._board.others if other not in statuses]
        return describe_culprits(statuses, {other: self._board.last_seen(other) for other in silent})

    def _check_not_broken(self, reason: str) -> None:
        if reason:
            raise ExchangeTimeout(
                f"rank {self.rank}: the ranks gave up their connections in an earlier generation ({reason}); "
                "start all processes again"
            )


def _collect_answers(board: StatusBoard) -> dict[int, PeerStatus]:
    """Return the statuses that the others write after an alarm, as far as they do."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        statuses = board.statuses()
        # A rank that computes has not noticed yet. It should be able to say so before this process ends, as
        # torchrun ends all others then.
        all_answered = len(statuses) == len(board.others)
        noticed = all_answered and all(peer.kind != "computes" for peer in statuses.values())
        if noticed or board.is_silent or time.monotonic() > deadline:
            return statuses
        time.sleep(0.02)


def _wait_for_acknowledgements(board: StatusBoard, statuses: Mapping[int, PeerStatus]) -> None:
    """Wait until all who answered know who is to blame.

    The store may go with this process, and torchrun ends all others then.
    """
    deadline = time.monotonic() + ANSWER_SECONDS
    board.acknowledge()
    ranks = [rank for rank, peer in statuses.items() if peer.kind != "done"]
    while not board.have_acknowledged(ranks):
        if board.is_silent or time.monotonic() > deadline:
            return
        time.sleep(0.02)


@contextmanager
def _sigterm_held_back() -> Iterator[list[int]]:
    """Note SIGTERM within in the list, and let it take effect at the end."""
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
