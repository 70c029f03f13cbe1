"""Codecs: bytes as claimed, the same numbers on every rank, errors as small as theory says."""

from __future__ import annotations

import pytest
import torch

from otil_xdit.codec import CODECS, Raw, _pack, _unpack, make_codec

LOSSY = [name for name in CODECS if name != "raw"]


def coded(name: str, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codec = make_codec(name, vectors.dtype)
    payload = torch.full((codec.size(*vectors.shape),), 255, dtype=torch.uint8)
    codec.encode(vectors, payload)
    return payload, codec.decode(payload, *vectors.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_raw_is_the_values(dtype: torch.dtype) -> None:
    vectors = torch.randn(5, 7).to(dtype)
    payload, decoded = coded("raw", vectors)
    assert payload.numel() == 35 * dtype.itemsize
    assert torch.equal(decoded, vectors) and decoded.dtype == dtype


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize(("count", "width"), [(1, 1), (3, 5), (6, 64), (7, 33)])
def test_bytes_are_a_byte_a_vector_and_the_bits(name: str, count: int, width: int) -> None:
    payload, decoded = coded(name, torch.randn(count, width))
    bits = {"int8": 8, "int4": 4, "2bit": 2, "1bit": 1}[name]
    assert payload.numel() == count + (count * width * bits + 7) // 8
    assert decoded.shape == (count, width)


@pytest.mark.parametrize(("name", "least"), [("int8", 35.0), ("int4", 19.0), ("2bit", 9.0), ("1bit", 4.2)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 3e3])
def test_signal_to_noise_on_normal_values(name: str, least: float, size: float) -> None:
    """Max, table I: 1, 2 and 4 bits leave 0.3634, 0.1175 and 0.0115 of the variance: 4.4, 9.3 and 19.4 dB.

    A scale of 64 numbers fits them a little better than the true variance would, its byte a little worse.
    """
    vectors = size * torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    _, decoded = coded(name, vectors)
    noise = (decoded - vectors).square().mean() / vectors.square().mean()
    assert -10 * torch.log10(noise) > least


def test_every_code_of_every_lane_survives() -> None:
    for bits in (1, 2, 4):
        codes = torch.randint(2**bits, (1001,), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
        packed = torch.empty(-(-1001 * bits // 8), dtype=torch.uint8)
        _pack(codes, bits, packed)
        assert torch.equal(_unpack(packed, bits)[:1001], codes)


def test_the_largest_number_is_not_cut_off_by_int8() -> None:
    vectors = torch.tensor([[0.0, 1.0, -37.3], [0.0, 0.001, 0.0007]])
    _, decoded = coded("int8", vectors)
    assert ((decoded - vectors).abs() <= vectors.abs().amax(1, keepdim=True) * 1.13 / 254).all()


@pytest.mark.parametrize("name", LOSSY)
def test_nothing_becomes_next_to_nothing(name: str) -> None:
    _, decoded = coded(name, torch.zeros(3, 8))
    assert decoded.abs().max() < 1e-5


def test_several_ranks_decode_at_once() -> None:
    codec = make_codec("2bit", torch.float32)
    vectors = torch.randn(3, 4, 6)
    payloads = torch.empty(3, codec.size(4, 6), dtype=torch.uint8)
    for one, payload in zip(vectors, payloads, strict=True):
        codec.encode(one, payload)
    one_by_one = torch.stack([codec.decode(payload, 4, 6) for payload in payloads])
    assert torch.equal(codec.decode(payloads, 4, 6), one_by_one)


def test_kinds() -> None:
    assert isinstance(make_codec("raw", torch.float16), Raw) and not Raw(torch.float16).of_residuals
    assert [make_codec(name, torch.float32).bits for name in CODECS] == [32, 8, 4, 2, 1]
