"""What each step does, how many steps there are, and the settings that say so."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from otil_xdit.method.config import OtilConfig
from otil_xdit.method.schedule import Clock, Schedule
from otil_xdit.runtime.steps import track_steps


def modes(total: int | None, steps: int, **settings: Any) -> str:
    """The initials of all steps' modes: Sync, Fresh, Displaced."""
    schedule = Schedule.from_config(OtilConfig(**settings))
    return "".join(schedule.mode(step, step, total)[0] for step in range(steps))


@pytest.mark.parametrize(
    ("total", "share", "expected"),
    [
        (4, 0.5, "ssff"),
        (15, 0.5, "ss" + 6 * "f" + 7 * "d"),
        (50, 0.5, "ss" + 23 * "f" + 25 * "d"),
        (300, 0.07, "ss" + 19 * "f" + 279 * "d"),  # 0.07 * 300 is a little more than 21
        (15, 0.0, "ss" + 13 * "d"),
        (15, 1.0, "ss" + 13 * "f"),
        (4, 0.1, "ssff"),
        (20, 0.1, "ss" + 6 * "f" + 12 * "d"),
        (1, 0.5, "s"),
    ],
)
def test_a_share_of_the_steps_waits(total: int, share: float, expected: str) -> None:
    assert modes(total, total, fresh_share=share) == expected


def test_without_a_total_all_steps_wait_unless_none_should() -> None:
    assert modes(None, 20) == "ss" + 18 * "f"
    assert modes(None, 20, fresh_share=0.0) == "ss" + 18 * "d"


def test_all_steps_wait_where_each_draws_noise_unless_none_should() -> None:
    def noisy(share: float) -> str:
        schedule = Schedule.from_config(OtilConfig(fresh_share=share))
        return "".join(schedule.mode(step, step, 20, draws_noise=True)[0] for step in range(20))

    assert noisy(0.5) == "ss" + 18 * "f"
    assert noisy(0.0) == "ss" + 18 * "d"


def test_the_share_is_for_displaced_patches_only() -> None:
    assert modes(8, 8, freshness="fresh", fresh_share=0.0) == "ss" + 6 * "f"
    assert Schedule.from_config(OtilConfig(freshness="frozen")).mode(2, 2, 8) == "frozen"


def test_a_layer_that_starts_late_settles_by_its_own_calls() -> None:
    schedule = Schedule.from_config(OtilConfig())
    assert [schedule.mode(step, step - 5, 16) for step in (5, 7, 12, 13)] == ["sync", "fresh", "fresh", "displaced"]


def counted(scheduler: Any, first: int = 0) -> tuple[int | None, int]:
    """The total that the clock was given at the first step, and the number of steps that were done."""
    clock = Clock()
    x = torch.zeros(1, 4, 2, 2)
    with track_steps(scheduler, clock):
        for timestep in getattr(scheduler, "timesteps", [0, 1])[first:]:
            scheduler.step(x, timestep, x)
    return clock.total, clock.step


@pytest.mark.parametrize(
    ("kind", "steps", "calls"),
    [
        ("DDIMScheduler", 10, 10),
        ("DPMSolverMultistepScheduler", 15, 15),
        ("FlowMatchEulerDiscreteScheduler", 28, 28),
        ("HeunDiscreteScheduler", 5, 9),
        ("KDPM2DiscreteScheduler", 5, 9),
        ("PNDMScheduler", 10, 11),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, for what diffusers does
def test_text_to_image_takes_all_steps_of_the_scheduler(kind: str, steps: int, calls: int) -> None:
    settings = {"skip_prk_steps": True} if kind == "PNDMScheduler" else {}
    scheduler = getattr(diffusers, kind)(**settings)
    scheduler.set_timesteps(steps)
    assert counted(scheduler) == (calls, calls)


@pytest.mark.parametrize("first", [1, 4, 9])
def test_image_to_image_takes_what_is_left(first: int) -> None:
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(10)
    assert counted(scheduler, first) == (10 - first, 10 - first)


@pytest.mark.parametrize(
    ("kind", "settings", "arguments", "expected"),
    [
        ("DDIMScheduler", {}, {}, False),
        ("DDIMScheduler", {}, {"eta": 0.5}, True),
        ("DPMSolverMultistepScheduler", {}, {}, False),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}, True),
        ("EulerDiscreteScheduler", {}, {}, False),
        ("EulerDiscreteScheduler", {}, {"s_churn": 1.0}, True),
        ("EulerAncestralDiscreteScheduler", {}, {}, True),
        ("LCMScheduler", {}, {}, True),
        ("FlowMatchEulerDiscreteScheduler", {}, {}, False),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}, True),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, for what diffusers does
def test_the_first_step_tells_whether_noise_is_drawn(
    kind: str, settings: dict[str, Any], arguments: dict[str, Any], expected: bool
) -> None:
    scheduler, clock = getattr(diffusers, kind)(**settings), Clock()
    scheduler.set_timesteps(5)
    x = torch.zeros(1, 4, 2, 2)
    with track_steps(scheduler, clock):
        scheduler.step(x, scheduler.timesteps[0], x, **arguments)
    assert clock.draws_noise is expected
    clock.reset()
    assert clock.draws_noise is False


def test_a_scheduler_without_timesteps_has_no_total() -> None:
    class Plain:
        def step(self, output: torch.Tensor, timestep: int, sample: torch.Tensor) -> torch.Tensor:
            return sample

    assert counted(Plain()) == (None, 2)


def test_a_quality_is_a_point_of_the_settings() -> None:
    assert OtilConfig.of_quality(None) == OtilConfig.of_quality("balanced") == OtilConfig()
    draft, high = OtilConfig.of_quality("draft"), OtilConfig.of_quality("high")
    assert draft.ratio < OtilConfig().ratio < high.ratio == 1
    assert modes(15, 15, fresh_share=high.fresh_share) == "ss" + 13 * "f"
    assert OtilConfig.of_quality("draft", ratio=0.75, block_size=2) == OtilConfig(ratio=0.75, block_size=2)
    with pytest.raises(ValueError, match="quality is 'best'; choose from draft, balanced, high"):
        OtilConfig.of_quality("best")


@pytest.mark.parametrize(("ratio", "least"), [(1 / 8, 8), (0.3, 4), (1.0, 1)])
def test_a_bound_on_the_age_that_the_ratio_cannot_keep_is_refused(ratio: float, least: int) -> None:
    for accepted in (0, least, least + 1):
        OtilConfig(ratio=ratio, max_age=accepted)
    if least > 1:
        with pytest.raises(ValueError, match=rf"max_age is {least - 1}; at a ratio of .* give at least {least}, or 0"):
            OtilConfig(ratio=ratio, max_age=least - 1)
