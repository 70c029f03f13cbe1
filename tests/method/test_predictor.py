"""The shared predictor: its rule against the formulas, and copies that stay the same on all ranks for ever."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.method.codecs import CODECS
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.coordinates import AttentionWeights
from otil_xdit.method.grid import TokenLayout
from otil_xdit.method.predictor import Predictor, storage_dtypes
from otil_xdit.method.scratch import ScratchBuffers
from tests.support.ranks import run_ranks

SHAPE = (2, 1, 6, 4)
"""[2, B, S, C] of one rank."""


ALL = slice(0, 1)
"""The run of the one layer that most tests have."""


def make_predictor(layers: int = 1, rank: int = 0, **settings: object) -> Predictor:
    scratch = ScratchBuffers(torch.device("cpu"))
    return Predictor(torch.zeros(layers, *SHAPE), 2, rank, OtilConfig(**settings), scratch)


def everybody(step: float) -> torch.Tensor:
    """[N, 2, B, S, C] on straight lines: value and velocity are known exactly after two steps."""
    start = torch.randn(2, 2, 1, 6, 4, generator=torch.Generator().manual_seed(1))
    slope = torch.randn(2, 2, 1, 6, 4, generator=torch.Generator().manual_seed(2))
    return start + step * slope


def predicted(predictor: Predictor, gain: torch.Tensor) -> torch.Tensor:
    out = torch.full((2, 2, 1, 6, 4), torch.nan)
    predictor.predict_others(0, gain, out)
    return torch.where(out.isnan(), own(predictor, gain), out)


def own(predictor: Predictor, gain: torch.Tensor) -> torch.Tensor:
    out = torch.empty(1, *SHAPE)
    predictor.predict_own(ALL, gain[None], out)
    return out[0]


def fitted(predictor: Predictor, fresh: torch.Tensor) -> torch.Tensor:
    """Return the gain that fits this rank's values, by way of what a prediction with some other gain lacks."""
    some = torch.tensor([[0.25, 0.5]]) if predictor.is_fitted else torch.full((1, 2), predictor.constant_gain)
    residual = torch.empty(1, *SHAPE)
    predictor.residual_of(ALL, fresh[None], some, residual)
    return predictor.fitted_gain(0, residual[0], some[0])


def ones_at(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residuals of 1 of the same tokens of both ranks, as levels and scales, and what says that they were sent."""
    sent = torch.zeros(1, 2, 6)
    sent[:, :, tokens] = 1
    return torch.ones(1, 2, *SHAPE), sent[:, :, None, None, :, None].expand(1, 2, 2, 1, 6, 1), sent


def test_straight_lines_are_predicted() -> None:
    predictor = make_predictor()
    predictor.set_values(0, everybody(0))
    predictor.set_values(0, everybody(1))
    gain = fitted(predictor, everybody(2)[0])
    torch.testing.assert_close(gain, torch.ones(2))
    torch.testing.assert_close(predicted(predictor, gain), everybody(2))
    torch.testing.assert_close(own(predictor, gain), everybody(2)[0])


def test_the_gain_follows_the_size_of_the_step() -> None:
    predictor = make_predictor()
    predictor.set_values(0, everybody(0))
    predictor.set_values(0, everybody(1))
    for step, expected in ((1.5, 0.5), (1.0, 0.0), (0.0, 0.0), (9.0, 1.25)):
        torch.testing.assert_close(fitted(predictor, everybody(step)[0]), torch.full((2,), expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"extrapolation": "none"}, 1.0), ({"extrapolation": "constant", "extrapolation_gain": 0.5}, 1.5)],
)
def test_other_rules(settings: dict, expected: float) -> None:
    predictor = make_predictor(**settings)
    predictor.set_values(0, everybody(0))
    predictor.set_values(0, everybody(1))
    torch.testing.assert_close(predicted(predictor, fitted(predictor, everybody(2)[0])), everybody(expected))


def test_a_residual_corrects_value_and_velocity_by_its_age() -> None:
    predictor = make_predictor(ratio=0.5, velocity_damping=0.5)
    predictor.set_values(0, everybody(0))
    predictor.set_values(0, everybody(1))
    slope = everybody(1) - everybody(0)
    gains = torch.ones(1, 2, 2, 2)
    predictor.apply_residuals(ALL, gains, *ones_at([0, 1]))
    value, velocity = everybody(2), slope.clone()
    value[..., :2, :] += 1
    velocity[..., :2, :] += 1
    velocity[..., 2:, :] *= 0.5
    torch.testing.assert_close(predictor.value[0], value)
    torch.testing.assert_close(predictor.velocity[0], velocity)
    predictor.apply_residuals(ALL, gains, *ones_at([2, 3]))  # two steps after the last news of these tokens
    value = value + velocity
    velocity[..., 2:4, :] += 1 / 2
    velocity[..., :2, :] *= 0.5
    velocity[..., 4:, :] *= 0.5
    value[..., 2:4, :] += 1
    torch.testing.assert_close(predictor.value[0], value)
    torch.testing.assert_close(predictor.velocity[0], velocity)


def test_tokens_that_were_not_sent_have_a_gain_of_their_own() -> None:
    predictor = make_predictor(ratio=0.5, velocity_damping=1.0)
    predictor.set_values(0, everybody(0))
    predictor.set_values(0, everybody(1))
    slope = everybody(1) - everybody(0)
    gains = torch.tensor([[0.5, 0.25], [1.0, 0.75]]).expand(1, 2, 2, 2)  # of what was sent and of others
    levels, scales, sent = ones_at([0, 1])
    predictor.apply_residuals(ALL, gains, 0 * levels, scales, sent)
    moved = slope * torch.tensor([1.0, 0.75]).view(2, 1, 1, 1)
    moved[..., :2, :] = (slope * torch.tensor([0.5, 0.25]).view(2, 1, 1, 1))[..., :2, :]
    torch.testing.assert_close(predictor.value[0], everybody(1) + moved)
    torch.testing.assert_close(predictor.velocity[0], moved)


def test_a_synchronous_step_brings_the_velocity_of_one_step() -> None:
    """After a step without news of some tokens, their change is that of two steps; news makes them one step old."""
    predictor = make_predictor(ratio=0.5, velocity_damping=1.0)
    for step in (0, 1):
        predictor.set_values(0, everybody(step))
    slope, gains = everybody(1) - everybody(0), torch.zeros(1, 2, 2, 2)
    bend = torch.randn(2, 2, 1, 6, 4, generator=torch.Generator().manual_seed(3))
    levels, scales, sent = ones_at([0, 1])
    predictor.velocity[0].copy_(slope)
    predictor.apply_residuals(ALL, torch.ones_like(gains), 0 * levels, scales, sent)  # as foretold
    predictor.apply_residuals(ALL, torch.ones_like(gains), 0 * levels, scales, sent)
    predictor.set_values(0, everybody(4) + bend)
    # Twice without news since step 1, so that the tokens are three steps old; the first two are one step old.
    beyond = everybody(4) + bend - everybody(3)
    expected = slope + (beyond - slope) / torch.tensor([1.0, 1, 3, 3, 3, 3])[:, None]
    torch.testing.assert_close(predictor.velocity[0], expected)
    predictor.set_values(0, everybody(6))
    torch.testing.assert_close(predictor.velocity[0], everybody(6) - everybody(4) - bend)


@pytest.mark.parametrize("size", [1.0, 1e-4])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_gain_is_of_this_rank_s_values_whatever_their_size(rank: int, size: float) -> None:
    predictor = make_predictor(rank=rank)
    for step in (0, 1):
        predictor.set_values(0, size * everybody(step))
    gain = fitted(predictor, size * everybody(1.75)[rank])
    torch.testing.assert_close(gain, torch.full((2,), 0.75), atol=1e-4, rtol=0)
    expected = size * everybody(1.75)[rank]
    torch.testing.assert_close(own(predictor, gain), expected, atol=1e-4 * size, rtol=0)


def test_a_new_generation_knows_nothing_of_the_last() -> None:
    predictor = make_predictor()
    for step in (0, 1):
        predictor.set_values(0, everybody(step))
    assert torch.equal(predictor.last_values(0), everybody(1))
    predictor.reset()
    assert not predictor.last_values(0).any()
    predictor.set_values(0, everybody(5))
    assert torch.equal(predictor.value[0], everybody(5)) and not predictor.velocity[0].any()


def test_a_layer_of_many_moves_as_one_by_itself() -> None:
    alone, many = make_predictor(ratio=0.5), make_predictor(layers=3, ratio=0.5)
    for step in (0, 1):
        alone.set_values(0, everybody(step))
        many.set_values(1, everybody(step))
    before = [tensor.clone() for tensor in many.tensors]
    for run, predictor in ((ALL, alone), (slice(1, 2), many)):
        predictor.apply_residuals(run, torch.ones(1, 2, 2, 2), *ones_at([0, 5]))
    for one, other, old in zip(alone.tensors, many.tensors, before, strict=True):
        assert torch.equal(one[0], other[1]) and not torch.equal(other[1], old[1])
        assert torch.equal(other[[0, 2]], old[[0, 2]])


def test_values_replace_the_prediction() -> None:
    predictor = make_predictor(ratio=1.0)
    predictor.set_values(0, everybody(0))
    predictor.apply_values(ALL, torch.ones(1, 2, 2, 2), everybody(1)[None], None, None)
    torch.testing.assert_close(predictor.value[0], everybody(1))
    torch.testing.assert_close(predictor.velocity[0], everybody(1) - everybody(0))


@pytest.mark.parametrize("extrapolation", ["none", "fitted"])
def test_some_values_replace_their_predictions(extrapolation: str) -> None:
    """Token 4 of both ranks; it is sent twice, which counts once."""
    predictor, tokens = make_predictor(ratio=0.5, extrapolation=extrapolation), [4, 4]
    predictor.set_values(0, everybody(0))
    sent = ones_at(tokens)[2]
    rows = (torch.arange(2 * 2 * 1)[:, None] * 6 + torch.tensor(tokens)).flatten()
    predictor.apply_values(ALL, torch.ones(1, 2, 2, 2), everybody(1)[None][..., tokens, :], rows, sent)
    value = everybody(0)
    value[..., 4, :] = everybody(1)[..., 4, :]
    assert torch.equal(predictor.value[0], value)
    if predictor.velocity is not None:
        torch.testing.assert_close(predictor.velocity[0], value - everybody(0))


def test_values_of_some_tokens_leave_the_others_on_their_way() -> None:
    predictor = make_predictor(ratio=0.5, velocity_damping=1.0)
    for step in (0, 1):
        predictor.set_values(0, everybody(step))
    slope, value = everybody(1) - everybody(0), everybody(2)
    value[..., 4, :] += 1
    rows = torch.arange(2 * 2 * 1) * 6 + 4
    predictor.apply_values(ALL, torch.ones(1, 2, 2, 2), value[None][..., [4], :], rows, ones_at([4])[2])
    slope[..., 4, :] += 1
    torch.testing.assert_close(predictor.value[0], value)
    torch.testing.assert_close(predictor.velocity[0], slope)


@pytest.mark.parametrize(
    ("kv_cache_dtype", "dtype", "expected"),
    [
        ("auto", torch.float32, (torch.float32, torch.float32)),
        ("auto", torch.float16, (torch.float16, torch.float8_e5m2)),
        ("auto", torch.bfloat16, (torch.bfloat16, torch.float8_e5m2)),
        ("same", torch.float16, (torch.float16, torch.float16)),
        ("bfloat16", torch.float16, (torch.bfloat16, torch.bfloat16)),
        ("float8", torch.float32, (torch.bfloat16, torch.float8_e5m2)),
    ],
)
def test_what_copies_are_kept_in(
    kv_cache_dtype: str, dtype: torch.dtype, expected: tuple[torch.dtype, torch.dtype]
) -> None:
    assert storage_dtypes(kv_cache_dtype, dtype) == expected


def test_a_velocity_beyond_8_bits_is_the_largest_there_is() -> None:
    predictor = make_predictor(kv_cache_dtype="float8")
    for size in (0.0, 1e5, -1e5):
        predictor.set_values(0, torch.full((2, *SHAPE), size))
        assert predictor.velocity.float().isfinite().all()
    levels, scales, sent = ones_at([0])
    predictor.apply_residuals(ALL, torch.ones(1, 2, 2, 2), -1e6 * levels, scales, sent)
    assert predictor.velocity.float().min() == -57344


@pytest.mark.parametrize(
    ("kv_cache_dtype", "share"), [("auto", 1.0), ("same", 1.0), ("bfloat16", 0.5), ("float8", 0.375)]
)
def test_copies_take_less(kv_cache_dtype: str, share: float) -> None:
    full, less = make_predictor(ratio=1.0), make_predictor(ratio=1.0, kv_cache_dtype=kv_cache_dtype)
    sizes = [sum(tensor.nbytes for tensor in predictor.tensors) for predictor in (less, full)]
    assert sizes[0] == sizes[1] * share


def random_settings(dice: random.Random, codec: str) -> dict:
    return {
        "codec": codec,
        "ratio": dice.choice([1 / 8, 1 / 3, 1 / 2, 1.0]),
        "extrapolation": dice.choice(["none", "constant", "fitted", "fitted"]),
        "kv_cache_dtype": dice.choice(["auto", "same", "bfloat16", "float8"]),
        "select": dice.choice(["kv-l2", "kv-cosine", "random"]),
        "score_reference": dice.choice(["prediction", "previous"]),
        "polling": dice.choice([0.0, 0.5]),
        "fresh_share": dice.choice([0.0, 0.3, 1.0]),
        "refresh": dice.choice([0, 0, 7]),
        "warmup_steps": dice.choice([1, 2]),
        "tolerance": dice.choice([0.0, 0.3]),
        "block_size": dice.choice([1, 2, 4]),
        "coordinates": dice.choice(["weights", "none"]),
    }


def random_weights(heads: int, size: int) -> AttentionWeights:
    """Weights of an attention layer, the same on all ranks."""
    chance = torch.Generator().manual_seed(heads * size)
    return AttentionWeights(heads, *torch.randn(4, heads * size, heads * size, generator=chance))


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
        run = OtilCommunicator(config, PatchGroup(dist.group.WORLD, rank, dist.get_world_size()))
        if dice.random() < 0.7:  # without weights coordinates follow from the values
            run.set_weights({"net/a": random_weights(shape[1], shape[3])})
        run.begin()
        run.clock.total = dice.randint(3, 60)
        noise = torch.Generator().manual_seed(done * 10 + rank)  # every rank has values of its own
        base = torch.randn(2, *shape, generator=noise)
        for _ in range(run.clock.total):
            base = base + dice.choice([0.01, 0.1, 1.0]) * torch.randn(2, *shape, generator=noise)
            run.observe(None, TokenLayout(rows, cols, text="rear" if text else "none"))
            run.gather("net/a#0", *base.to(dtype))
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
    run = OtilCommunicator(OtilConfig(check=True, warmup_steps=1), PatchGroup(dist.group.WORLD, dist.get_rank(), 2))
    run.begin()
    key = torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(2):
        run.gather("block.3", key, key)
        run.clock.tick()
    if dist.get_rank() == 1:
        group, layer = run.kv.place_of("block.3")
        group.apply_pending()
        group.shared_state(layer)[0][0, 0, 0, 0, 0] += 1e-3
    with pytest.raises(RuntimeError, match=r"copies of layer block.3 at step 2 on ranks \[1\]"):
        run.gather("block.3", key, key)
    run.end()


def reconstruction(**settings: object) -> float:
    """Mean squared error of what rank 0 knows of rank 1's smooth curves, after warm-up."""
    rank = dist.get_rank()
    run = OtilCommunicator(OtilConfig(**settings, fresh_share=0.0), PatchGroup(dist.group.WORLD, rank, 2))

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
        "stale": {"extrapolation": "none", "codec": "raw", "ratio": 1.0},
        "predicted": {"codec": "raw", "ratio": 1.0},
        "predicted, int8": {"codec": "int8", "ratio": 1.0},
        "1bit": {"codec": "1bit", "ratio": 1.0, "extrapolation": "none", "freshness": "fresh"},
        "2bit": {"codec": "2bit", "ratio": 1.0, "extrapolation": "none", "freshness": "fresh"},
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
