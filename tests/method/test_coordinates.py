"""Coordinates of keys and values: they do not change with a network's channels, and errors in them do equal harm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from otil_xdit.method.coordinates import AttentionWeights, Coordinates
from otil_xdit.method.scores import CHANGE_SCORES
from otil_xdit.method.scratch import ScratchBuffers

HEADS, SIZE, INPUTS = 3, 8, 40
ROOM = ScratchBuffers(torch.device("cpu"))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(**changes: object) -> AttentionWeights:
    width = HEADS * SIZE
    queries, keys, values = (normal(width, INPUTS, seed=seed) for seed in range(3))
    return replace(AttentionWeights(HEADS, queries, keys, values, normal(INPUTS, width, seed=3)), **changes)


def of_weights(given: AttentionWeights) -> Coordinates:
    found = Coordinates.of_weights(given)
    assert found is not None
    return found


def by_head(matrices: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply what a layer returns, [C, D], by matrices, [H, d, d]."""
    return (matrices @ weight.unflatten(0, (HEADS, SIZE))).flatten(0, 1)


def equivalent(given: AttentionWeights, keys: torch.Tensor, values: torch.Tensor) -> AttentionWeights:
    """The weights of an attention that computes the same, with keys and values multiplied by [H, d, d]."""
    return replace(
        given,
        queries=by_head(torch.linalg.inv(keys).mT, given.queries),
        keys=by_head(keys, given.keys),
        values=by_head(values, given.values),
        outputs=by_head(torch.linalg.inv(values).mT, given.outputs.mT).mT,
    )


def coordinates_of(given: AttentionWeights, states: torch.Tensor) -> torch.Tensor:
    """Coordinates of the keys and values of states, [S, D]: float32 [2, S, C]."""
    values = torch.stack([states @ given.keys.mT, states @ given.values.mT]).float()[None, :, None]
    out = torch.empty_like(values)
    of_weights(given).into(values, out, ROOM)
    return out[0, :, 0]


def test_back_is_the_inverse() -> None:
    found, values = of_weights(weights()), torch.randn(3, 2, 2, 5, HEADS * SIZE)
    coordinates = torch.empty_like(values)
    found.into(values, coordinates, ROOM)
    assert not torch.allclose(coordinates, values, atol=0.1)
    torch.testing.assert_close(found.back(coordinates, ROOM), values, rtol=1e-3, atol=1e-3)
    half = coordinates.bfloat16()
    torch.testing.assert_close(found.back(half, ROOM), found.back(half.float(), ROOM).clone())


@pytest.mark.parametrize("kind", ["scaled", "rotated", "mixed"])
def test_equivalent_networks_have_the_same_coordinates(kind: str) -> None:
    scales = torch.diag_embed((1.5 * normal(2, HEADS, SIZE, seed=7)).exp())
    turned = torch.linalg.qr(normal(2, HEADS, SIZE, SIZE, seed=8)).Q
    changes = {"scaled": scales, "rotated": turned, "mixed": turned @ scales}[kind]
    plain, changed = weights(), equivalent(weights(), *changes)
    states = normal(20, INPUTS, seed=9)
    expected, found = coordinates_of(plain, states), coordinates_of(changed, states)
    same = (found * expected).sum(dim=1, keepdim=True).sign()  # an axis may be found the other way round
    torch.testing.assert_close(found * same, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("score", ["l2", "cosine", "ssim", "dhash"])
def test_sub_blocks_of_equivalent_networks_have_the_same_scores(score: str) -> None:
    changes = torch.linalg.qr(normal(2, HEADS, SIZE, SIZE, seed=8)).Q @ torch.diag_embed(normal(2, HEADS, SIZE).exp())
    before, table = normal(24, INPUTS, seed=9), torch.arange(24).view(6, 4)
    after = before + 0.3 * normal(24, INPUTS, seed=10)
    scores = [
        CHANGE_SCORES[score](coordinates_of(given, after), coordinates_of(given, before), table)
        for given in (weights(), equivalent(weights(), *changes))
    ]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-3, atol=1e-4)
    assert scores[0].std() > 0.01 * scores[0].mean()


def test_lengths_are_errors_in_what_reads_them() -> None:
    """A key's error makes queries' products err; the mean over white input is its squared length in coordinates."""
    given = weights()
    found = of_weights(given)
    error = torch.randn(1, 2, 1, 1, HEADS * SIZE)
    out = torch.empty_like(error)
    found.into(error, out, ROOM)
    heads = error.double().view(2, HEADS, SIZE)
    products = torch.einsum("hd,hdi->hi", heads[0], given.queries.unflatten(0, (HEADS, SIZE)))
    harm = torch.einsum("hd,ohd->ho", heads[1], given.outputs.unflatten(1, (HEADS, SIZE)))
    expected = torch.stack([part.square().sum(dim=-1) for part in (products, harm)]).float()
    lengths = out.view(2, HEADS, SIZE).square().sum(dim=-1)
    torch.testing.assert_close(lengths, expected, rtol=1e-3, atol=1e-3)


def test_coordinates_of_white_input_are_uncorrelated() -> None:
    given = weights()
    into = of_weights(given).matrices[0].double()
    for weight, matrices in zip((given.keys, given.values), into, strict=True):
        heads = weight.unflatten(0, (HEADS, SIZE))
        moment = matrices.mT @ heads @ heads.mT @ matrices
        spread = moment.diagonal(dim1=-2, dim2=-1)
        assert (moment - torch.diag_embed(spread)).abs().max() < 1e-3 * spread.max()
        assert (spread.diff(dim=-1) > 0).all()  # and not all alike: the last ones carry most


def test_normalised_keys_follow_the_weights_of_the_norms() -> None:
    norm = normal(SIZE, seed=4).exp()
    plain = weights(query_norm=norm, key_norm=torch.ones(SIZE))
    scale = normal(SIZE, seed=5).exp()
    changed = replace(plain, query_norm=norm / scale, key_norm=scale)
    keys = torch.randn(1, 2, 1, 6, HEADS * SIZE)
    scaled = keys * scale.float().repeat(HEADS)
    found = []
    for given, values in ((plain, keys), (changed, scaled)):
        found.append(torch.empty_like(keys))
        of_weights(given).into(values, found[-1], ROOM)
    torch.testing.assert_close(found[0][:, 0].abs(), found[1][:, 0].abs(), rtol=1e-3, atol=1e-3)


def test_keys_that_are_turned_are_only_scaled_by_pairs() -> None:
    matrices = of_weights(weights(is_rotary=True)).matrices[0]
    scales = matrices[0].diagonal(dim1=-2, dim2=-1)
    assert torch.equal(matrices[0], torch.diag_embed(scales)) and (scales > 0).all()
    assert torch.equal(scales[:, ::2], scales[:, 1::2]) and not torch.equal(scales[:, 0], scales[:, 2])


@pytest.mark.parametrize("part", ["queries", "keys", "outputs"])
def test_weights_that_say_nothing_give_none(part: str) -> None:
    assert Coordinates.of_weights(weights(**{part: torch.full_like(getattr(weights(), part), torch.nan)})) is None
    assert Coordinates.of_weights(weights(**{part: torch.zeros_like(getattr(weights(), part))})) is None


def test_the_state_of_weights_changes_when_they_are_written_to() -> None:
    given = weights()
    before, digest = given.state, of_weights(given).digest
    assert given.state == before and of_weights(given).digest == digest
    given.outputs.mul_(2)
    assert given.state != before and of_weights(given).digest != digest


def test_measured_coordinates_have_features_of_like_size() -> None:
    values = torch.randn(2, 2, 1, 50, HEADS * SIZE) * torch.logspace(-3, 3, HEADS * SIZE)
    found = Coordinates.unknown(HEADS, SIZE, torch.device("cpu"))
    found.measure(values.square())
    out = torch.empty_like(values)
    found.into(values, out, ROOM)
    sizes = out.square().mean(dim=(0, 2, 3)).sqrt()
    assert 0.6 < sizes.min() and sizes.max() < 1.7
    assert torch.equal(found.back(out, ROOM), values)  # powers of 2 are exact


def test_a_feature_that_was_0_when_it_was_measured_may_become_as_large_as_any() -> None:
    """In warm-up's 8 bits a feature is 0 in all tokens where a token's largest is 254 times as large."""
    values = torch.randn(2, 2, 1, 50, HEADS * SIZE)
    measured = values.square()
    measured[..., 3] = 0
    measured[:, 1] = 0
    found = Coordinates.unknown(HEADS, SIZE, torch.device("cpu"))
    found.measure(measured)
    out = torch.empty_like(values)
    found.into(values, out, ROOM)
    assert out.abs().max() < 3000 and out.half().isfinite().all(), "copies of 16 bits hold it"
    assert torch.equal(found.back(out, ROOM), values)
