"""Codecs: bytes as claimed, the same numbers on every rank, errors as small as theory says."""

from __future__ import annotations

import pytest
import torch

from otil_xdit.codec import CODECS, Quantised, Raw, make_codec
from otil_xdit.workspace import Workspace

LOSSY = [name for name in CODECS if name != "raw"]
ROOM = Workspace(torch.device("cpu"))


def encoded(name: str, vectors: torch.Tensor) -> torch.Tensor:
    """Bytes of vectors, [..., V, C]: [..., size]."""
    codec = make_codec(name, vectors.dtype)
    payload = torch.full((*vectors.shape[:-2], codec.size(*vectors.shape[-2:])), 255, dtype=torch.uint8)
    codec.encode(vectors.clone(), payload, ROOM)
    return payload


def decoded_by(name: str, payload: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """What the bytes say; `vectors` gives shape and dtype."""
    codec = make_codec(name, vectors.dtype)
    if isinstance(codec, Raw):
        return codec.values(payload, *vectors.shape[-2:])
    scales, codes = codec.split(payload, *vectors.shape[-2:])
    return codec.levels(codes, vectors.shape[-1], ROOM) * codec.scales(scales)[..., None]


def coded(name: str, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    payload = encoded(name, vectors)
    return payload, decoded_by(name, payload, vectors)


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
    assert payload.numel() == count * (1 + (width * bits + 7) // 8)
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


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("width", [1, 3, 8, 33])
def test_every_number_is_the_nearest_level(name: str, width: int) -> None:
    """Whatever the codes share a byte with: each number becomes the level nearest to it, at its vector's scale."""
    vectors = torch.randn(50, width, generator=torch.Generator().manual_seed(width))
    codec = make_codec(name, torch.float32)
    assert isinstance(codec, Quantised)
    payload, decoded = coded(name, vectors)
    every_byte = torch.arange(256, dtype=torch.uint8)[:, None]
    levels = codec.levels(every_byte, 8 // codec.bits, ROOM).unique()
    scales = codec.scales(codec.split(payload, 50, width)[0])[:, None]
    nearest = (vectors[..., None] - scales[..., None] * levels).abs().amin(-1)
    assert len(levels) == (255 if codec.bits == 8 else 2**codec.bits)
    torch.testing.assert_close((decoded - vectors).abs(), nearest, rtol=1e-5, atol=1e-6)


def test_the_largest_number_is_not_cut_off_by_int8() -> None:
    vectors = torch.tensor([[0.0, 1.0, -37.3], [0.0, 0.001, 0.0007]])
    _, decoded = coded("int8", vectors)
    assert ((decoded - vectors).abs() <= vectors.abs().amax(1, keepdim=True) * 1.13 / 254).all()


@pytest.mark.parametrize("name", LOSSY)
def test_nothing_becomes_next_to_nothing(name: str) -> None:
    _, decoded = coded(name, torch.zeros(3, 8))
    assert decoded.abs().max() < 1e-5


@pytest.mark.parametrize("name", CODECS)
def test_layers_and_ranks_are_coded_at_once(name: str) -> None:
    vectors = torch.randn(3, 2, 4, 6)
    payloads, decoded = coded(name, vectors)
    for layer, rank in ((0, 0), (2, 1)):
        alone, decoded_alone = coded(name, vectors[layer, rank])
        assert torch.equal(payloads[layer, rank], alone)
        assert torch.equal(decoded[layer, rank], decoded_alone)


def test_kinds() -> None:
    assert isinstance(make_codec("raw", torch.float16), Raw) and not Raw(torch.float16).of_residuals
    assert [make_codec(name, torch.float32).bits for name in CODECS] == [32, 8, 4, 2, 1]
