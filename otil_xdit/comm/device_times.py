"""The device's own time for spans of work, by CUDA events on some steps.

Where a card computes, the host's clock says when something was enqueued, not how long it took. Two events on the
stream say it. They cost launches, so a few steps have them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

import torch

Span = Literal["exchange", "waited"]

EVERY, FIRST = 8, 3
"""Steps that are timed: every so many, from so many on. The first ones make buffers."""


class DeviceTimes:
    """Spans of the current stream on the steps that are timed.

    Attributes:
        is_timing: whether the present step is one.
        steps: number of those that are done.
    """

    def __init__(self) -> None:
        self.is_timing = False
        self.steps = 0
        self._spans: defaultdict[Span, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)

    def clear(self) -> None:
        """Begin a generation, whose first step is not timed."""
        self.is_timing, self.steps = False, 0
        self._spans.clear()

    def after_step(self, step: int) -> None:
        """Take note that the step of this index is done."""
        self.steps += self.is_timing
        self.is_timing = (step + 1 - FIRST) % EVERY == 0 and step + 1 >= FIRST

    def mark(self) -> torch.cuda.Event:
        """Return the present place of the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, span: Span, began: torch.cuda.Event) -> None:
        """Take note of a span that ends here."""
        self._spans[span].append((began, self.mark()))

    def seconds(self, span: Span) -> float | None:
        """Return the time of all such spans together, once the device has passed them; None where nothing was timed."""
        if not self.steps:
            return None
        found = 0.0
        for began, ended in self._spans[span]:
            ended.synchronize()
            found += began.elapsed_time(ended) * 1e-3
        return found
