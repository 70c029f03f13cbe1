"""What a step launches, and how long the device has nothing to do in it, by torch's profiler."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


class StepProfiler:
    """Profiles the last step of an image.

    Args:
        steps: of the image.
    """

    def __init__(self, steps: int) -> None:
        self._last = steps - 1
        self._cuda = torch.cuda.is_available()
        self._profile = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._cuda])

    def on_step_end(self, step: int) -> None:
        """Begin with the end of the step before the last one, and end with that."""
        if step < self._last - 1:
            return
        if self._cuda:
            torch.cuda.synchronize()
        if step < self._last:
            self._profile.start()
        else:
            self._profile.stop()

    def counts(self) -> dict[str, float | None]:
        """Return ``launches`` of kernels, ``busy_ms`` and ``idle_ms``; on the CPU operators, and None for times."""
        # torch's own objects round these crash now and then when they are collected (2.13, after several profiles).
        results = self._profile.profiler
        assert results is not None and results.kineto_results is not None, "an image has been profiled"
        events = results.kineto_results.events()
        if not self._cuda:
            operators = [(one.start_ns(), one.end_ns()) for one in events if one.name().startswith("aten::")]
            return {"launches": count_innermost(operators), "busy_ms": None, "idle_ms": None}
        kernels = [event for event in events if _is_kernel(event)]
        busy, span = busy_and_span([(kernel.start_ns(), kernel.end_ns()) for kernel in kernels])
        launches = sum(not kernel.name().startswith("Mem") for kernel in kernels)
        return {"launches": launches, "busy_ms": busy / 1e6, "idle_ms": (span - busy) / 1e6}


def count_innermost(calls: Sequence[tuple[int, int]]) -> int:
    """Count the calls, each from start to end in one thread, that make no other call."""
    ordered = sorted(calls, key=lambda call: (call[0], -call[1]))
    return len(ordered) - sum(after[0] < before[1] for before, after in pairwise(ordered))


def busy_and_span(intervals: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return how long at least one interval runs, and the time from the first start to the last end."""
    if not intervals:
        return 0, 0
    ordered = sorted(intervals)
    busy, reached = 0, ordered[0][0]
    for start, end in ordered:
        busy += max(0, end - max(start, reached))
        reached = max(reached, end)
    return busy, reached - ordered[0][0]


def _is_kernel(event: Any) -> bool:
    """Tell whether the device did this; annotations of the host stand on its timeline, too."""
    is_annotation = event.is_user_annotation() if hasattr(event, "is_user_annotation") else False
    return event.device_type().name == "CUDA" and not is_annotation
