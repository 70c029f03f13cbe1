"""The shared predictor: its rule against the formulas, and copies that stay the same on all ranks for ever."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist

from otil_xdit.codec import CODECS
from otil_xdit.config import OtilConfig
from otil_xdit.exchange import PatchGroup
from otil_xdit.grid import TokenLayout
from otil_xdit.predictor import Predictor
from otil_xdit.run import OtilRun
from tests.ranks import run_ranks

SHAPE = (2, 1, 6, 4)
"""[2, B, S, C] of one rank."""


def make_predictor(**settings: object) -> Predictor:
    return Predictor(torch.zeros(SHAPE), 2, 0, OtilConfig(**settings))


def everybody(step: float) -> torch.Tensor:
    """[2, B, N, S, C] on straight lines: value and velocity are known exactly after two steps."""
    start = torch.randn(2, 1, 2, 6, 4, generator=torch.Generator().manual_seed(1))
    slope = torch.randn(2, 1, 2, 6, 4, generator=torch.Generator().manual_seed(2))
    return start + step * slope


def predicted(predictor: Predictor, gain: torch.Tensor) -> torch.Tensor:
    out = torch.empty(2, 1, 2, 6, 4)
    predictor.predict(gain, out)
    return out


def test_straight_lines_are_predicted() -> None:
    predictor = make_predictor()
    predictor.learn(everybody(0))
    predictor.learn(everybody(1))
    gain = predictor.gain(everybody(2)[:, :, 0])
    torch.testing.assert_close(gain, torch.ones(2))
    torch.testing.assert_close(predicted(predictor, gain), everybody(2))
    torch.testing.assert_close(predictor.own(gain), everybody(2)[:, :, 0])


def test_the_gain_follows_the_size_of_the_step() -> None:
    predictor = make_predictor()
    predictor.learn(everybody(0))
    predictor.learn(everybody(1))
    for step, expected in ((1.5, 0.5), (1.0, 0.0), (0.0, 0.0), (9.0, 1.25)):
        torch.testing.assert_close(
            predictor.gain(everybody(step)[:, :, 0]), torch.full((2,), expected), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    ("settings", "expected"), [({"predict": "none"}, 1.0), ({"predict": "constant", "gain": 0.5}, 1.5)]
)
def test_other_rules(settings: dict, expected: float) -> None:
    predictor = make_predictor(**settings)
    predictor.learn(everybody(0))
    predictor.learn(everybody(1))
    torch.testing.assert_close(predicted(predictor, predictor.gain(everybody(2)[:, :, 0])), everybody(expected))


def test_a_residual_corrects_value_and_velocity_by_its_age() -> None:
    predictor = make_predictor(ratio=0.5, damping=0.5)
    predictor.learn(everybody(0))
    predictor.learn(everybody(1))
    slope = everybody(1) - everybody(0)
    gains = torch.ones(2, 2)
    first, second = torch.tensor([[0, 1], [6, 7]]), torch.tensor([[2, 3], [8, 9]])
    residual = torch.ones(2, 1, 2, 2, 4)
    predictor.update(gains, residual, first, residuals=True)
    value, velocity = everybody(2), slope.clone()
    value[:, :, :, :2] += 1
    velocity[:, :, :, :2] += 1
    velocity[:, :, :, 2:] *= 0.5
    torch.testing.assert_close(predictor.value, value)
    torch.testing.assert_close(predictor.velocity, velocity)
    predictor.update(gains, residual, second, residuals=True)  # two steps after the last news of these tokens
    value = value + velocity
    velocity[:, :, :, 2:4] += 1 / 2
    velocity[:, :, :, :2] *= 0.5
    velocity[:, :, :, 4:] *= 0.5
    value[:, :, :, 2:4] += 1
    torch.testing.assert_close(predictor.value, value)
    torch.testing.assert_close(predictor.velocity, velocity)


def test_a_token_that_is_sent_twice_counts_once() -> None:
    once, twice = make_predictor(ratio=0.5), make_predictor(ratio=0.5)
    for predictor, tokens in ((once, [[0, 1], [6, 7]]), (twice, [[0, 1, 1], [6, 7, 7]])):
        predictor.learn(everybody(0))
        at = torch.tensor(tokens)
        predictor.update(torch.ones(2, 2), torch.ones(2, 1, 2, at.shape[1], 4), at, residuals=True)
    assert torch.equal(once.value, twice.value) and torch.equal(once.velocity, twice.velocity)


def test_values_replace_the_prediction() -> None:
    predictor = make_predictor()
    predictor.learn(everybody(0))
    predictor.update(torch.ones(2, 2), everybody(1), None, residuals=False)
    torch.testing.assert_close(predictor.value, everybody(1))
    torch.testing.assert_close(predictor.velocity, everybody(1) - everybody(0))


@pytest.mark.parametrize(("copies", "share"), [("full", 1.0), ("half", 0.5), ("small", 0.375)])
def test_copies_take_less(copies: str, share: float) -> None:
    full, less = make_predictor(ratio=1.0), make_predictor(ratio=1.0, copies=copies)
    assert less.nbytes == full.nbytes * share


def random_settings(dice: random.Random, codec: str) -> dict:
    return {
        "codec": codec,
        "ratio": dice.choice([1 / 8, 1 / 3, 1 / 2, 1.0]),
        "predict": dice.choice(["none", "constant", "measured", "measured"]),
        "copies": dice.choice(["full", "half", "small"]),
        "select": dice.choice(["kv-l2", "kv-cosine", "random"]),
        "against": dice.choice(["prediction", "previous"]),
        "polling": dice.choice([0.0, 0.5]),
        "fresh_share": dice.choice([0.0, 0.3, 1.0]),
        "refresh": dice.choice([0, 0, 7]),
        "warmup_steps": dice.choice([1, 2]),
        "tolerance": dice.choice([0.0, 0.3]),
        "block": dice.choice([1, 2, 4]),
    }


def drift(codec: str, steps: int) -> int:
    """Random sizes and settings on the same ranks, `steps` steps in all; the debug check compares the copies.

    Returns how many generations that were.
    """
    dice, rank = random.Random(codec), dist.get_rank()
    done = generations = 0
    while done < steps:
        generations += 1
        dtype = dice.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
        rows, cols, text = dice.randint(2, 5), dice.randint(2, 6), dice.choice([0, 0, 3])
        shape = (dice.choice([1, 2]), dice.choice([1, 3]), rows * cols + text, dice.choice([1, 4, 5]))
        config = OtilConfig(**random_settings(dice, codec), check=True, timeout=20.0)
        run = OtilRun(config, PatchGroup(dist.group.WORLD, rank, dist.get_world_size()))
        run.begin()
        run.clock.total = dice.randint(3, 60)
        noise = torch.Generator().manual_seed(done * 10 + rank)  # every rank has values of its own
        base = torch.randn(2, *shape, generator=noise)
        for _ in range(run.clock.total):
            base = base + dice.choice([0.01, 0.1, 1.0]) * torch.randn(2, *shape, generator=noise)
            run.observe(None, TokenLayout(rows, cols, text="rear" if text else "none"))
            run.gather("a", *base.to(dtype))
            run.clock.tick()
        done += run.clock.total
        run.end()
    return generations


def drift_all(steps: int) -> list[int]:
    return [drift(codec, steps) for codec in CODECS]


@pytest.mark.parametrize(
    ("world_size", "steps"), [(3, 150), *(pytest.param(ranks, 1000, marks=pytest.mark.slow) for ranks in (2, 3, 4))]
)
def test_copies_stay_the_same_on_all_ranks(world_size: int, steps: int) -> None:
    """So many random steps with every codec."""
    generations = run_ranks(world_size, drift_all, steps, deadline=300)
    assert all(count > steps / 60 for count in generations[0])


def test_the_check_finds_a_copy_that_differs() -> None:
    run_ranks(2, _spoilt_copy)


def _spoilt_copy() -> None:
    run = OtilRun(OtilConfig(check=True, warmup_steps=1), PatchGroup(dist.group.WORLD, dist.get_rank(), 2))
    run.begin()
    key = torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(2):
        run.gather("block.3", key, key)
        run.clock.tick()
    if dist.get_rank() == 1:
        run._layers["block.3"].shared_state[0][0, 0, 0, 0, 0] += 1e-6
    with pytest.raises(RuntimeError, match=r"copies of layer block.3 at step 2 on ranks \[1\]"):
        run.gather("block.3", key, key)
    run.end()


def reconstruction(**settings: object) -> float:
    """Mean squared error of what rank 0 knows of rank 1's smooth curves, after warm-up."""
    rank = dist.get_rank()
    run = OtilRun(OtilConfig(**settings, fresh_share=0.0), PatchGroup(dist.group.WORLD, rank, 2))

    def values(of: int, step: int) -> torch.Tensor:
        noise = torch.Generator().manual_seed(of)
        start, slope, bend = torch.randn(3, 2, 1, 2, 32, 8, generator=noise)
        t = (step / 10) ** 1.5
        return start + t * slope + 0.3 * t**2 * bend

    run.begin()
    errors = []
    for step in range(10):
        seen = torch.stack(run.gather("a", *values(rank, step)))
        errors.append((seen - torch.cat([values(0, step), values(1, step)], dim=3)).square().mean().item())
        run.clock.tick()
    run.end()
    return sum(errors[2:])


def compare_settings() -> dict[str, float]:
    points = {
        "stale": {"predict": "none", "codec": "raw", "ratio": 1.0},
        "predicted": {"codec": "raw", "ratio": 1.0},
        "predicted, int8": {"codec": "int8", "ratio": 1.0},
        "1bit": {"codec": "1bit", "ratio": 1.0, "predict": "none", "freshness": "fresh"},
        "2bit": {"codec": "2bit", "ratio": 1.0, "predict": "none", "freshness": "fresh"},
        "predicted, 2bit": {"codec": "2bit", "ratio": 1.0, "freshness": "fresh"},
        "half, by prediction": {"codec": "raw", "ratio": 0.5},
        "half, by chance": {"codec": "raw", "ratio": 0.5, "select": "random"},
    }
    return {name: reconstruction(**settings) for name, settings in points.items()}


def test_prediction_and_bits_help_on_smooth_curves() -> None:
    error = run_ranks(2, compare_settings)[0]
    assert error["predicted"] < error["stale"] / 4
    assert error["predicted, int8"] < error["predicted"] * 1.05
    assert error["predicted, 2bit"] < error["2bit"] / 2 < error["1bit"] / 4
    assert error["half, by prediction"] < error["half, by chance"]
