"""Both predictions of guidance: how they are found, how far they differ, and one for both."""

from __future__ import annotations

import pytest
import torch

from otil_xdit.hybridiff.guidance import Guidance


def rel_mae(uncond: torch.Tensor, cond: torch.Tensor) -> float:
    return ((cond - uncond).abs().mean() / uncond.abs().mean()).item()


def pair_of(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    return made[0], made[1]


@pytest.fixture
def guidance() -> Guidance:
    made = Guidance()
    made.begin()
    return made


def test_one_batch_of_both(guidance: Guidance) -> None:
    uncond, cond = pair_of(0, 3, 4, 8, 8)
    guidance.record(torch.cat((uncond, cond)))
    guidance.end_step(torch.zeros(3, 4, 8, 8))
    assert guidance.is_guided
    assert guidance.curve(None) == [pytest.approx(rel_mae(uncond, cond), rel=1e-5)]


def test_two_calls_the_one_with_the_prompt_first(guidance: Guidance) -> None:
    uncond, cond = pair_of(1, 2, 16, 8)
    guidance.record(cond)
    guidance.record(uncond)
    guidance.end_step(torch.zeros(2, 16, 8))
    assert guidance.curve(None) == [pytest.approx(rel_mae(uncond, cond), rel=1e-5)]


@pytest.mark.parametrize("passes", [1, 3])
def test_other_numbers_of_passes_are_no_guidance(guidance: Guidance, passes: int) -> None:
    guidance.record(torch.randn(passes * 2, 4, 8, 8))
    guidance.end_step(torch.zeros(2, 4, 8, 8))
    assert not guidance.is_guided
    assert guidance.curve(None) == [None]


def test_halves_of_something_else_are_no_guidance(guidance: Guidance) -> None:
    guidance.record_pair(*pair_of(9, 3, 4, 8, 8))  # three passes of two images, cut in the middle
    guidance.end_step(torch.zeros(2, 4, 8, 8))
    assert not guidance.is_guided
    assert guidance.curve(None) == [None]


def test_a_predicted_variance_does_not_count(guidance: Guidance) -> None:
    uncond, cond = pair_of(2, 1, 8, 4, 4)
    guidance.record_pair(uncond, cond)
    guidance.end_step(torch.zeros(1, 4, 4, 4))
    assert guidance.curve(None) == [pytest.approx(rel_mae(uncond[:, :4], cond[:, :4]), rel=1e-5)]


def test_parts_of_several_ranks_count_as_one(guidance: Guidance) -> None:
    uncond, cond = pair_of(3, 1, 4, 8, 8)
    other = Guidance()
    for one, rows in ((guidance, slice(0, 3)), (other, slice(3, 8))):
        one.record_pair(uncond[:, :, rows], cond[:, :, rows])
        one.end_step(torch.zeros(1))
    shown: list[torch.Tensor] = []

    def note(part: torch.Tensor) -> torch.Tensor:
        shown.append(part)
        return part[None]

    other.discrepancy(note)
    found = guidance.discrepancy(lambda part: torch.stack((part, shown[0])))
    assert found == pytest.approx(rel_mae(uncond, cond), rel=1e-5)
    assert found != pytest.approx(guidance.curve(None)[0], rel=1e-3), "of this rank's rows alone it is another number"


def test_where_one_is_computed_the_difference_is_held(guidance: Guidance) -> None:
    guidance.is_wanted = True
    uncond, cond = pair_of(4, 1, 4, 8, 8)
    guidance.record_pair(uncond, cond)
    guidance.end_step(torch.zeros(1, 4, 8, 8))
    guidance.is_staged = True
    nonsense, later = pair_of(5, 1, 4, 8, 8)
    for _ in range(2):
        made, same = guidance.record_pair(nonsense, later)
        torch.testing.assert_close(later - made, cond - uncond)
        assert same is later
        guidance.end_step(torch.zeros(1))
    assert guidance.is_guided
    assert guidance.curve(None)[1:] == [None, None], "nothing was measured there"


def test_without_holding_both_are_the_one_that_is_computed() -> None:
    guidance = Guidance("none")
    guidance.is_wanted = guidance.is_staged = True
    nonsense, cond = pair_of(6, 1, 4, 8, 8)
    assert guidance.record_pair(nonsense, cond) == (cond, cond)


def test_each_call_of_a_step_has_a_difference_of_its_own(guidance: Guidance) -> None:
    guidance.is_wanted = True
    for shape in ((1, 4), (1, 6)):
        guidance.record_pair(torch.zeros(shape), torch.ones(shape) * shape[1])
    guidance.end_step(torch.zeros(1))
    guidance.is_staged = True
    for shape in ((1, 4), (1, 6)):
        made, _ = guidance.record_pair(torch.zeros(shape), torch.zeros(shape))
        assert made.tolist() == [[-float(shape[1])] * shape[1]]
