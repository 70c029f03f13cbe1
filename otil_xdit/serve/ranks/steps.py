"""Between two steps: progress for rank 0, and the agreement of all ranks on where a cancelled image ends.

The pipelines of diffusers, and xDiT's wrappers of them, make a progress bar and move it on after each step. Here they
get one that costs no collective and needs no latent. Rank 0 decides for each step, `LOOKAHEAD` steps ahead, whether it
is the last one; the others read that. So all of them leave the pipeline after the same step, with the same exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from otil_xdit.serve.engine import Cancelled
from otil_xdit.serve.ranks.relay import LOOKAHEAD, Relay


class StepControl:
    """The steps of one image on one rank.

    Args:
        relay: to the other ranks; None for a single one.
        is_first: whether this is rank 0.
        is_cancelled: tells, on rank 0, whether the image is wanted no more.
        on_step: called on rank 0 after each step, with the steps done and those of the image.
        seconds: that rank 0 may take for a word.
    """

    def __init__(
        self,
        relay: Relay | None,
        is_first: bool,
        is_cancelled: Callable[[], bool],
        on_step: Callable[[int, int], None],
        seconds: float,
    ) -> None:
        self._relay, self._is_first, self._is_cancelled = relay, is_first, is_cancelled
        self._on_step, self._seconds = on_step, seconds
        self._last: int | None = None

    def after(self, step: int, steps: int) -> None:
        """End a step.

        Args:
            step: steps done.
            steps: of the image.

        Raises:
            Cancelled: on all ranks after the same step.
        """
        if self._is_first:
            ahead = step if self._relay is None else step + LOOKAHEAD
            if self._last is None and self._is_cancelled() and ahead < steps:
                self._last = ahead
            if self._relay is not None and ahead < steps:
                self._relay.decide(ahead, self._last == ahead)
            self._on_step(step, steps)
        elif self._relay is not None and LOOKAHEAD < step < steps and self._relay.is_last(step, self._seconds):
            self._last = step
        if step == self._last:
            raise Cancelled(f"after step {step} of {steps}")

    @contextmanager
    def of(self, pipe: Any) -> Iterator[None]:
        """Let the pipeline's calls move this on within."""
        holders = [pipe, vars(pipe).get("module")]

        def progress_bar(iterable: Iterable[Any] | None = None, total: int | None = None) -> _Bar:
            return _Bar(self, iterable, total)

        for holder in filter(None, holders):
            vars(holder)["progress_bar"] = progress_bar
        try:
            yield
        finally:
            for holder in filter(None, holders):
                vars(holder).pop("progress_bar", None)


class _Bar:
    """In place of tqdm's bar."""

    def __init__(self, control: StepControl, iterable: Iterable[Any] | None, total: int | None) -> None:
        self._control, self._iterable = control, iterable
        self._total = len(list(iterable)) if total is None and iterable is not None else total or 0
        self._done = 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for value in self._iterable or ():
            yield value
            self.update()

    def update(self, steps: int = 1) -> None:
        self._done += steps
        self._control.after(self._done, max(self._total, self._done))
