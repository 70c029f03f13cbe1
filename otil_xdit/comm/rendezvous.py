"""`Rendezvous`: where the ranks meet before the first step of a generation, through the store alone.

Nothing has been sent over the ranks' connections before all have come, so a call that only some ranks make hurts
nothing: those that came give it up together after the timeout, and each rank's next call is a generation that the
others can still come to. A generation is given up or begun by all alike, as the first rank that sees either writes it
where nobody can write it a second time.

A rank that comes when a generation was given up without it may be late, or may never have been meant to come and now
makes the next call. Its facts tell: they are those of the call that was given up, or those of the call in which the
others wait now.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from otil_xdit.comm.peer_status import PeerStatus, describe_error
from otil_xdit.comm.status_board import StatusBoard
from otil_xdit.errors import PipelineBusyError

Facts = Mapping[str, str]

REFUSAL = "a refusal"
"""The fact, of a rank that has one, by which the others know why it will not go on."""

START = "the start of the generation"
"""Where a rank is that has begun no message yet."""

_BEGUN = "begun"
"""Outcome of a generation to which all ranks have come; any other text says why it was given up."""

_PAUSE = 0.05
"""Seconds between two looks for the call that the others make next."""


class Rendezvous:
    """The meetings of one session's ranks.

    Args:
        board: the session's.
        rank: this one.
        timeout: seconds to wait for the others.
        check: raises where the ranks' connections are broken, or the store does not answer.
    """

    def __init__(self, board: StatusBoard, rank: int, timeout: float, check: Callable[[], None]) -> None:
        self._board, self._rank, self._timeout, self._check = board, rank, timeout, check

    def meet(self, facts: Facts) -> dict[int, dict[str, str]]:
        """Return every rank's facts for this generation, by rank; wait until all have come to it.

        Raises:
            PipelineBusyError: when a rank does not come, on all that came; when this one comes too late to a call; or
                when a lower rank waits in another session's generation, which comes later here. The next call of all
                ranks is served.
        """
        board, deadline = self._board, time.monotonic() + self._timeout
        self._catch_up(facts, deadline)
        board.post_facts(facts)
        while (found := board.facts()) is None:
            self._check_order()
            self._check()
            outcome = board.outcome()
            if not outcome and time.monotonic() > deadline:
                outcome = board.settle(self._who_is_missing())
                self._check()
            if outcome not in ("", _BEGUN):
                raise self._left(outcome)
        outcome = board.settle(_BEGUN)
        if outcome != _BEGUN:
            self._check()  # no answer is no outcome
            raise self._left(outcome)
        board.wait_no_more()
        board.forget_last_generations()
        return {self._rank: dict(facts), **found}

    def _catch_up(self, facts: Facts, deadline: float) -> None:
        """Go on to the generation that nobody has given up yet, where the others gave some up without this rank.

        Raises:
            PipelineBusyError: where this call is one of those that were given up.
        """
        board = self._board
        late: tuple[int, str] | None = None
        while True:
            outcome = board.outcome()
            if late is None and not outcome:
                return
            theirs = board.facts_of_anyone()
            is_theirs = theirs is not None and _are_alike(facts, theirs)
            if outcome:  # it was given up, as it cannot have begun without this rank
                late = (board.generation, outcome) if late is None and is_theirs else late
                board.generation += 1
            elif is_theirs:
                return
            elif late is not None and (theirs is not None or time.monotonic() > deadline):
                board.generation = late[0]
                raise self._left(f"{late[1]}; this rank has come since")
            else:
                self._check_order()
                self._check()
                time.sleep(_PAUSE)

    def _check_order(self) -> None:
        """Leave the generation where a lower rank waits in another session's, which this rank has not begun.

        What this rank leaves in place of its facts refuses the generation on the others, when they come to it.
        """
        other = self._board.rank_elsewhere()
        if other is not None:
            error = PipelineBusyError(
                f"rank {other} waits in a call of another pipeline, which rank {self._rank} has not begun: call the "
                "pipelines in the same order on all ranks"
            )
            self._board.post(PeerStatus("failed", START, 0, describe_error(error)))
            self._board.post_facts({REFUSAL: str(error)})
            self._leave()
            raise error

    def _who_is_missing(self) -> str:
        missing = self._board.ranks_without_facts()
        ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        return (
            f"{ranks} did not come to this call within {self._timeout:g} s: busy with something else, dead or stopped"
        )

    def _left(self, reason: str) -> PipelineBusyError:
        """Leave the generation, of which nothing has been sent; return the error that says why."""
        self._leave()
        return PipelineBusyError(f"rank {self._rank}: {reason}; nothing was begun: make the call on all ranks")

    def _leave(self) -> None:
        self._board.wait_no_more()
        self._board.stop_polling()


def _are_alike(facts: Facts, theirs: Facts) -> bool:
    """Tell whether two ranks' facts are of the same call."""
    return all(theirs[name] == value for name, value in facts.items() if name in theirs)
