"""The adaptive codec: uneven features lose less, the bytes are bounded, and everybody finds the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otil_xdit.method.adaptive_codec import AdaptiveCodec
from otil_xdit.method.codec import Quantised
from otil_xdit.method.scratch import ScratchBuffers

ROOM = ScratchBuffers(torch.device("cpu"))
CODEC = AdaptiveCodec()


def coded(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of vectors, [..., V, C], and what they say."""
    payload = torch.full((*vectors.shape[:-2], CODEC.size(*vectors.shape[-2:])), 255, dtype=torch.uint8)
    CODEC.encode(vectors.clone(), payload, ROOM)
    numbers, scales = CODEC.decode(payload, *vectors.shape[-2:], ROOM)
    assert scales is not None
    return payload, numbers * scales


def features(spread: float, *shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers whose features' sizes are log-normal."""
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=chance) * (spread * torch.randn(shape[-1], generator=chance)).exp()


def share_lost(vectors: torch.Tensor, decoded: torch.Tensor) -> float:
    return float((decoded - vectors).square().mean() / vectors.square().mean())


@given(vectors=st.integers(1, 200).map(lambda half: 2 * half), width=st.integers(1, 400))
def test_bytes_are_at_most_those_of_two_bits_where_there_are_vectors_enough(vectors: int, width: int) -> None:
    fixed = Quantised(2).size(vectors, width)
    if vectors >= 16 and width >= 8:
        assert CODEC.size(vectors, width) <= fixed
    assert CODEC.size(vectors, width) <= fixed + 2 * width
    assert CODEC.size(vectors, width) > fixed - vectors / 2 or vectors < 16


def test_uneven_features_lose_less_than_with_two_bits_each() -> None:
    """Even ones lose what evenly spaced levels lose against the best ones, 0.1188 against 0.1175, and a byte's bits."""
    plain = Quantised(2)
    for spread, least_gain in ((0.0, 0.75), (1.0, 6.0), (2.0, 50.0)):
        vectors = features(spread, 400, 64)
        payload = torch.zeros(plain.size(400, 64), dtype=torch.uint8)
        plain.encode(vectors.clone(), payload, ROOM)
        numbers, scales = plain.decode(payload, 400, 64, ROOM)
        assert scales is not None
        assert share_lost(vectors, coded(vectors)[1]) * least_gain < share_lost(vectors, numbers * scales)


def test_keys_and_values_have_bits_of_their_own() -> None:
    keys, values = features(2.0, 200, 32, seed=1), features(2.0, 200, 32, seed=2)
    found = [coded(torch.cat([size * keys, values]))[1][200:] for size in (1.0, 1e3)]
    assert torch.equal(*found) and share_lost(values, found[0]) < 0.02


def test_what_is_too_low_is_written_as_what_is_too_high_is() -> None:
    """Levels lie alike on both sides of 0, and a number beyond them spoils no other one's code."""
    vectors = features(0.5, 40, 24)
    vectors[3, 5], vectors[30, 7] = 40.0, -40.0
    decoded, mirrored = coded(vectors)[1], coded(-vectors)[1]
    torch.testing.assert_close(decoded, -mirrored)
    assert decoded[3, 5] > 0 > decoded[30, 7]


def test_half_of_the_codes_bytes_are_left_however_few_vectors_there_are() -> None:
    for width in (8, 33, 64):
        assert sum(CODEC.row_bytes(2, width)) >= Quantised(2).row_bytes(width)


def test_layers_and_ranks_are_coded_at_once() -> None:
    vectors = torch.stack([features(1.0, 2, 12, 20, seed=seed) for seed in range(3)])
    payloads, decoded = coded(vectors)
    for layer, rank in ((0, 0), (2, 1)):
        alone, decoded_alone = coded(vectors[layer, rank])
        assert torch.equal(payloads[layer, rank], alone) and torch.equal(decoded[layer, rank], decoded_alone)


def test_some_of_the_rows_are_those_of_all() -> None:
    vectors = features(1.0, 2, 12, 20)
    payload, decoded = coded(vectors)
    # Six of eight rows of keys, and as many of values, of both layers.
    rows = torch.cat([torch.tensor([7, 1, 2, 0, 5, 6]) + 8 * half for half in range(4)])
    numbers, scales = CODEC.decode_at(payload, 12, 20, rows, 16, ROOM)
    assert scales is not None
    found = (numbers * scales).view(32, 20)
    assert torch.equal(found[rows], decoded.view(24, 20))
    assert int((found != 0).sum()) == int((decoded != 0).sum())


@pytest.mark.parametrize("size", [0.0, 1e-4, 3e3])
def test_any_size(size: float) -> None:
    vectors = size * features(1.0, 100, 33)
    decoded = coded(vectors)[1]
    assert (decoded - vectors).abs().max() < 1e-5 if size == 0 else share_lost(vectors, decoded) < 0.05
