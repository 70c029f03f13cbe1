"""The window: the steps in which a generation may skip work that all other steps do.

Hybridiff (Jung et al., "Accelerating Diffusion via Hybrid Data-Pipeline Parallelism Based on Conditional Guidance
Scheduling", CVPR 2026) finds it in the *denoising discrepancy* of a step: how far the predictions with and without the
prompt differ, mean|e_c - e_u| / mean|e_u|. It falls in the early steps, stays low, and rises at the end. The window
begins at tau_1, when it has stopped falling, and ends at tau_2 = tau_1 + k.

Every rank records the same numbers, so every rank finds the same window.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class Thresholds:
    """When the discrepancy counts as having stopped falling.

    Attributes:
        slope: eps of the paper; the largest fall a step.
        span: L of the paper; the number of steps over which the fall is averaged.
        cap: the step at which the window begins if it has not by then.
    """

    slope: float
    span: int
    cap: int


PUBLISHED_UNET = Thresholds(slope=4e-4, span=12, cap=15)
PUBLISHED_DIT = Thresholds(slope=5e-4, span=15, cap=40)
"""The paper's thresholds for SDXL and for Stable Diffusion 3, both for 50 steps."""


@dataclass(frozen=True)
class WindowSettings:
    """What the settings say of the window.

    Attributes:
        kind: `NONE` for none, `AUTO` to find it, or ``"FIRST:END"``, steps counted from 0, END not among them.
        steps: k, how many steps one that is found lasts.
        slope, span, cap: as in `Thresholds`; None for the published ones.
    """

    kind: str = NONE
    steps: int = 5
    slope: float | None = None
    span: int | None = None
    cap: int | None = None

    @property
    def given(self) -> tuple[int, int] | None:
        """The first step and the one after the last, where the settings name them; else None.

        Raises:
            ValueError: naming what is accepted.
        """
        if self.kind in (AUTO, NONE):
            return None
        found = re.fullmatch(r"(\d+):(\d+)", self.kind)
        first, end = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= first <= end:
            raise ValueError(
                f"window is {self.kind!r}; give {AUTO}, {NONE}, or FIRST:END with steps counted from 0, such as 12:17; "
                "the step before the first is a whole one, so FIRST is 1 at least"
            )
        return first, end

    def thresholds(self, is_unet: bool, total: int | None) -> Thresholds:
        """Return the thresholds for `total` steps; published ones leave room for the window, given ones stay."""
        published = PUBLISHED_UNET if is_unet else PUBLISHED_DIT
        cap = published.cap if total is None else max(1, min(published.cap, total - self.steps))
        return Thresholds(
            published.slope if self.slope is None else self.slope,
            published.span if self.span is None else self.span,
            cap if self.cap is None else self.cap,
        )

    def check(self, total: int) -> None:
        """Refuse a window that does not fit into `total` steps.

        Raises:
            ValueError: naming the setting and what is accepted.
        """
        if self.given is not None and self.given[1] > total:
            raise ValueError(f"window is {self.kind!r}, which a run of {total} steps has no room for; end at {total}")
        if self.kind != AUTO:
            return
        if self.steps >= total:
            raise ValueError(f"window_steps is {self.steps}; in a run of {total} steps give at most {total - 1}")
        if self.cap is not None and self.cap + self.steps > total:
            raise ValueError(
                f"window_cap is {self.cap}; a window of {self.steps} steps that begins there ends after the {total} "
                f"steps of the run; give at most {total - self.steps}, or a smaller --otil_window_steps"
            )


class Window:
    """The window of one generation after another.

    Args:
        settings: where it is, or how to find it.

    Attributes:
        is_unet: True where the network is a U-Net, whose published thresholds are others than a transformer's.
    """

    def __init__(self, settings: WindowSettings) -> None:
        self.settings = settings
        self._given = settings.given  # read by every layer at every step
        self._first: int | None = None
        self._curve: list[float] = []
        self.is_unet = False

    def begin(self) -> None:
        """Start a generation."""
        self._curve.clear()
        self._first = None if self._given is None else self._given[0]

    @property
    def exists(self) -> bool:
        """True where the settings name or search for a window."""
        return self.settings.kind != NONE

    @property
    def found(self) -> tuple[int, int] | None:
        """tau_1 and tau_2, the first step and the one after the last; None while they are not known."""
        if self._first is None:
            return None
        return self._given or (self._first, self._first + self.settings.steps)

    @property
    def is_looked_for(self) -> bool:
        """True while the window has not been found and `record` needs each step's discrepancy."""
        return self.settings.kind == AUTO and self._first is None

    def holds(self, step: int) -> bool:
        """Return whether `step` is in the window."""
        return self.found is not None and self.found[0] <= step < self.found[1]

    def may_begin_at(self, step: int, total: int | None) -> bool:
        """Return whether the window may begin at `step`, as far as is known before the step in front is done."""
        if not self.is_looked_for:
            return self.found is not None and self.found[0] == step
        wanted = self.settings.thresholds(self.is_unet, total)
        return step > wanted.span or step >= wanted.cap

    def record(self, step: int, discrepancy: float, total: int | None) -> None:
        """Record a step's discrepancy, and begin the window after it where the thresholds say so.

        Args:
            step: index of the step, which is done; all steps before it have been recorded.
            discrepancy: mean|e_c - e_u| / mean|e_u|.
            total: number of steps; None where it is not known.
        """
        self._curve.append(discrepancy)
        wanted = self.settings.thresholds(self.is_unet, total)
        if len(self._curve) > wanted.span:
            slope = (self._curve[-1 - wanted.span] - discrepancy) / wanted.span
            if 0 <= slope < wanted.slope:
                self._first = step + 1
        if step + 1 >= wanted.cap:
            self._first = step + 1
