"""What a step launches, and how long the device has nothing to do in it, by torch's profiler."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        events = self._profile.events()
        if not self._cuda:
            return {"launches": count_operators(events), "busy_ms": None, "idle_ms": None}
        kernels = [event for event in events if _is_kernel(event)]
        busy, span = busy_and_span([(kernel.time_range.start, kernel.time_range.end) for kernel in kernels])
        launches = sum(not kernel.name.startswith("Mem") for kernel in kernels)
        return {"launches": launches, "busy_ms": busy / 1e3, "idle_ms": (span - busy) / 1e3}


def count_operators(events: Iterable[Any]) -> int:
    """Count ATen's operators that call no other one."""

    def is_operator(event: Any) -> bool:
        return bool(event.name.startswith("aten::"))

    return sum(is_operator(event) and not any(map(is_operator, event.cpu_children)) for event in events)


def busy_and_span(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return how long at least one interval runs, and the time from the first start to the last end."""
    if not intervals:
        return 0.0, 0.0
    busy, reached = 0.0, intervals[0][0]
    ordered = sorted(intervals)
    reached = ordered[0][0]
    for start, end in ordered:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy, reached - ordered[0][0]


def _is_kernel(event: Any) -> bool:
    """Tell whether the device did this; annotations of the host stand on its timeline, too."""
    is_annotation = getattr(event, "is_user_annotation", False)
    return event.device_type == torch.autograd.DeviceType.CUDA and not is_annotation
