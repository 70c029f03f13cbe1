"""Runs the parts of a check one after the other; one that fails does not stop the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from otil_xdit.tools.check.rank import Call, CheckTask
from otil_xdit.tools.check.settings import Settings
from otil_xdit.tools.common.jobs import Interrupted, Job, JobFailed, Jobs
from otil_xdit.tools.common.worker import Answer

State = Literal["ok", "failed", "skipped"]


class Skipped(Exception):
    """A part has nothing to do on this machine; the message says why."""


@dataclass(frozen=True)
class Finding:
    """What a part found.

    Attributes:
        said: one line for the terminal.
        data: for the JSON.
        page: Markdown.
        wrong: what is not as it should be; the part failed where there is anything.
    """

    said: str
    data: dict[str, Any]
    page: str = ""
    wrong: tuple[str, ...] = ()


@dataclass
class Check:
    """What parts work with.

    Attributes:
        settings: of the check.
        jobs: starts ranks.
        found: the data of the parts before, by name.
        until: when the part is to be over, the start of ranks included, in `time.monotonic`'s seconds.
    """

    settings: Settings
    jobs: Jobs
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    until: float = 0.0
    _job: Job | None = field(default=None, init=False)

    @property
    def seconds(self) -> float:
        """What is left of the part's time."""
        return max(1.0, self.until - time.monotonic())

    def ranks(self) -> Job:
        """Return the ranks, which all parts share; they are started where there are none."""
        if self._job is None:
            self._job = self.jobs.start("check", CheckTask(self.settings.shares_card), self.settings.ranks)
        return self._job

    def ask(self, function: Callable[..., Answer], **arguments: Any) -> list[Answer]:
        """Call a function of a module on all ranks, with the same arguments, and return the answers by rank.

        Raises:
            JobFailed: when a rank fails, or does not answer within the part's time; then no rank is left.
        """
        job = self.ranks()
        try:
            return self.jobs.ask(job, [Call(function, arguments)] * job.ranks, self.seconds)
        except JobFailed:
            self.end_ranks()
            raise

    def end_ranks(self) -> None:
        """End the ranks; the next part that needs some starts others."""
        if self._job is not None:
            self.jobs.close(self._job)
            self._job = None


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: for ``--parts``.
        seconds: that it may take.
        about: what it checks.
        run: does it.
    """

    name: str
    seconds: float
    about: str
    run: Callable[[Check], Finding]


@dataclass(frozen=True)
class Result:
    """How a part went; `said` has the reason where it failed or was skipped."""

    part: Part
    state: State
    seconds: float
    finding: Finding

    def to_dict(self) -> dict[str, Any]:
        """Return the result for the JSON."""
        return {
            "part": self.part.name,
            "state": self.state,
            "seconds": round(self.seconds, 2),
            "budget_seconds": self.part.seconds,
            "said": self.finding.said,
            "wrong": list(self.finding.wrong),
            "data": self.finding.data,
        }


def run_parts(parts: Sequence[Part], check: Check) -> Iterator[Result]:
    """Run parts in their order; yield each one's result when it is there.

    Raises:
        Interrupted: after a signal.
    """
    for part in parts:
        started = time.monotonic()
        check.until = started + part.seconds
        state, finding = run_part(part, check)
        check.found[part.name] = finding.data
        yield Result(part, state, time.monotonic() - started, finding)


def run_part(part: Part, check: Check) -> tuple[State, Finding]:
    """Run one part; what stops it is its result."""
    try:
        finding = part.run(check)
    except Skipped as reason:
        return "skipped", Finding(str(reason), {})
    except JobFailed as failure:
        return "failed", Finding(f"{failure.reason}; see {failure.log}", {}, wrong=(failure.reason,))
    except Interrupted:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        return "failed", Finding(said, {}, wrong=(said,))
    return ("failed" if finding.wrong else "ok"), finding
