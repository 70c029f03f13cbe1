"""How gains follow what the layers before have found at the step: the sums alone, and on two real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.gain_trend import GainTrend, add, follow
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
HEADS, SIZE = 2, 4
TOKENS = {"a": 12, "b": 12, "c": 8}
"""Of layers; the last one is in a group of its own."""


def make_trend() -> GainTrend:
    trend = GainTrend()
    trend.allocate(CPU)
    return trend


def test_gains_follow_the_layers_before() -> None:
    trend = make_trend().at(3)
    expected = torch.tensor([0.8, 0.6])
    torch.testing.assert_close(follow(trend, expected), expected, rtol=0, atol=0)  # nothing is known yet
    add(trend, torch.tensor([0.5, 0.9]), torch.tensor([0.9, 0.9]))
    torch.testing.assert_close(follow(trend, expected), torch.tensor([0.6, 0.6]))
    add(trend, torch.tensor([0.5, 1.2]), torch.tensor([0.9, 0.3]))
    torch.testing.assert_close(follow(trend, expected), torch.tensor([0.8 - 0.72 / 2.8, 0.6 + 0.9 / 2.8]))


def test_gains_stay_within_their_bound() -> None:
    trend = make_trend().at(0)
    add(trend, torch.tensor([1.25, 0.0]), torch.tensor([0.0, 1.25]))
    torch.testing.assert_close(follow(trend, torch.tensor([1.0, 0.5])), torch.tensor([1.25, 0.0]))


def test_each_step_and_each_image_begins_anew() -> None:
    trend, one = make_trend(), torch.ones(2)
    add(trend.at(3), one, 0 * one)
    assert trend.at(3).tolist() == [1, 1, 1]
    assert not trend.at(4).any()
    add(trend.at(4), one, 0 * one)
    trend.begin()
    assert not trend.at(4).any()
    assert trend.nbytes == 12


def test_sums_made_in_inference_mode_can_be_written_to_outside() -> None:
    with torch.inference_mode():
        trend = make_trend()
        add(trend.at(0), torch.ones(2), torch.zeros(2))
    add(trend.at(0), torch.ones(2), torch.zeros(2))
    assert trend.sums.tolist() == pytest.approx([1.8, 1.8, 1.8])


def gains_of(fresh_share: float) -> dict[str, list[list[float]]]:
    """Each layer's gains at each step: of its payload, fitted, and expected next. The last step is half a step."""
    group = PatchGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    run = OtilCommunicator(OtilConfig(fresh_share=fresh_share, ratio=1.0, warmup_codec="raw", timeout=20.0), group)
    run.begin()
    found: dict[str, list[list[float]]] = {name: [] for name in TOKENS}
    for moved in (0.0, 1.0, 2.0, 3.0, 3.5):
        for seed, (name, tokens) in enumerate(TOKENS.items()):
            generator = torch.Generator().manual_seed(10 * dist.get_rank() + seed)
            start, velocity = torch.randn(2, 2, 1, HEADS, tokens, SIZE, generator=generator)
            run.gather(name, *(start + moved * velocity))
            place, layer = run.kv.place_of(name)
            if place.is_allocated:
                residuals = place._coder._residuals
                of_layer = (part[layer] for part in (residuals.gains, residuals.fitted, residuals.expected))
                found[name].append(torch.cat(list(of_layer)).tolist())
        run.clock.tick()
    run.end()
    return found


def on_each_rank() -> dict[str, Any]:
    return {"fresh": gains_of(1.0), "displaced": gains_of(0.0)}


@pytest.fixture(scope="module")
def both() -> list[dict[str, Any]]:
    return run_ranks(2, on_each_rank)


def test_a_payload_that_is_waited_for_is_coded_with_gains_that_follow(both: list[dict[str, Any]]) -> None:
    expected = {"a": 1.0, "b": 1 - 0.5 / 2, "c": 1 - 0.9 / 2.8}
    for found in both:
        for name, gain in expected.items():
            torch.testing.assert_close(found["fresh"][name][-1][:4], [gain, gain, 0.5, 0.5], rtol=0.02, atol=0)


def test_others_are_coded_with_what_was_expected(both: list[dict[str, Any]]) -> None:
    for found in both:
        for steps in found["displaced"].values():
            torch.testing.assert_close(steps[-1][:4], [1.0, 1.0, 0.5, 0.5], rtol=0.02, atol=0)


def test_a_part_of_what_was_found_is_expected_again(both: list[dict[str, Any]]) -> None:
    for found in both:
        for steps in found["displaced"].values():
            torch.testing.assert_close(steps[-1][4:], [0.7, 0.7], rtol=0.02, atol=0)
