"""How gains follow what the layers before have found at the step: the sums alone, and on two real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.exchange.gain_trend import GainTrend, add, follow
from otil_xdit.method.config import OtilConfig
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
HEADS, SIZE = 2, 4
TOKENS = {"a": 12, "b": 12, "c": 8}
"""Of layers; the last one is in a group of its own."""


def test_gains_follow_the_layers_before() -> None:
    trend = GainTrend().at(3, CPU)
    fitted = torch.tensor([0.8, 0.6])
    torch.testing.assert_close(follow(trend, fitted), fitted, rtol=0, atol=0)  # nothing is known yet
    add(trend, torch.tensor([0.5, 0.9]), torch.tensor([1.0, 0.9]))
    torch.testing.assert_close(follow(trend, fitted), torch.tensor([0.8 * 1.5 / 2, 0.6]))
    add(trend, torch.tensor([0.5, 1.2]), torch.tensor([1.0, 0.3]))
    torch.testing.assert_close(follow(trend, fitted), torch.tensor([0.8 * 2 / 3, 0.6 * 3.1 / 2.2]))


def test_gains_stay_within_their_bound() -> None:
    trend = GainTrend().at(0, CPU)
    add(trend, torch.tensor([1.25, 0.0]), torch.tensor([0.0, 1.25]))
    torch.testing.assert_close(follow(trend, torch.tensor([1.0, 1.0])), torch.tensor([1.25, 1 / 2.25]))


def test_each_step_and_each_image_begins_anew() -> None:
    trend = GainTrend()
    one = torch.ones(2)
    add(trend.at(3, CPU), one, one)
    assert trend.at(3, CPU).tolist() == [[1, 1], [1, 1]]
    assert trend.sums is trend.at(3, CPU)
    assert not trend.at(4, CPU).any()
    add(trend.at(4, CPU), one, one)
    trend.begin()
    assert not trend.at(4, CPU).any()
    assert trend.nbytes == 16


def test_sums_made_in_inference_mode_can_be_written_to_outside() -> None:
    trend = GainTrend()
    with torch.inference_mode():
        add(trend.at(0, CPU), torch.ones(2), torch.ones(2))
    add(trend.at(0, CPU), torch.ones(2), torch.ones(2))
    assert trend.sums.tolist() == [[2, 2], [2, 2]]


def gains_of(fresh_share: float) -> dict[str, list[list[float]]]:
    """Each layer's gains, of its payload and fitted, at each step; all move on as before but at the last, by a half."""
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
                found[name].append(torch.cat([residuals.gains[layer], residuals.fitted[layer]]).tolist())
        run.clock.tick()
    run.end()
    return found


def on_each_rank() -> dict[str, Any]:
    return {"fresh": gains_of(1.0), "displaced": gains_of(0.0)}


@pytest.fixture(scope="module")
def both() -> list[dict[str, Any]]:
    return run_ranks(2, on_each_rank)


def test_a_payload_that_is_waited_for_is_coded_with_gains_that_follow(both: list[dict[str, Any]]) -> None:
    expected = {"a": 1.0, "b": 1.5 / 2, "c": 2 / 3}
    for found in both:
        for name, gain in expected.items():
            torch.testing.assert_close(found["fresh"][name][-1], [gain, gain, 0.5, 0.5], rtol=0.02, atol=0)


def test_others_are_coded_with_those_of_the_step_before(both: list[dict[str, Any]]) -> None:
    for found in both:
        for steps in found["displaced"].values():
            torch.testing.assert_close(steps[-1], [1.0, 1.0, 0.5, 0.5], rtol=0.02, atol=0)
