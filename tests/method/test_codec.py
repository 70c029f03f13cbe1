"""Codecs: bytes as claimed, the same numbers on every rank, errors as small as theory says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otil_xdit.exchange.kv_payload import PayloadLayout
from otil_xdit.method.codec import Quantised, Raw, scales_of, write_scales
from otil_xdit.method.codecs import CODECS, make_codec
from otil_xdit.method.config import Extrapolation, OtilConfig
from otil_xdit.method.grid import Segment, block_table
from otil_xdit.method.scratch import ScratchBuffers

ALONE = [name for name in CODECS if name != "adaptive"]
"""Codecs that code every vector by itself; tests/method/test_adaptive_codec.py has the other."""

LOSSY = [name for name in ALONE if name != "raw"]
ROOM = ScratchBuffers(torch.device("cpu"))


def encoded(name: str, vectors: torch.Tensor) -> torch.Tensor:
    """Bytes of vectors, [..., V, C]: [..., size]."""
    codec = make_codec(name, vectors.dtype)
    payload = torch.full((*vectors.shape[:-2], codec.size(*vectors.shape[-2:])), 255, dtype=torch.uint8)
    codec.encode(vectors.clone(), payload, ROOM)
    return payload


def decoded_by(name: str, payload: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """What the bytes say; `vectors` gives shape and dtype."""
    numbers, scales = make_codec(name, vectors.dtype).decode(payload, *vectors.shape[-2:], ROOM)
    return numbers if scales is None else numbers * scales


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
    every_byte = torch.arange(255 if codec.bits == 8 else 256, dtype=torch.uint8)[:, None]
    levels = codec.levels(every_byte, 8 // codec.bits, ROOM).unique()
    scales = scales_of(codec.split(payload, 50, width)[0])[:, None]
    nearest = (vectors[..., None] - scales[..., None] * levels).abs().amin(-1)
    assert len(levels) == (255 if codec.bits == 8 else 2**codec.bits)
    torch.testing.assert_close((decoded - vectors).abs(), nearest, rtol=1e-5, atol=1e-6)


def test_the_largest_number_is_not_cut_off_by_int8() -> None:
    vectors = torch.tensor([[0.0, 1.0, -37.3], [0.0, 0.001, 0.0007]])
    _, decoded = coded("int8", vectors)
    assert ((decoded - vectors).abs() <= vectors.abs().amax(1, keepdim=True) * 1.13 / 254).all()


def test_a_scale_is_off_by_the_half_of_a_sixth_of_an_octave_at_most() -> None:
    scales = torch.logspace(-20, 20, 999, base=2.0)
    nearest, above = torch.empty(2, 999, dtype=torch.uint8)
    write_scales(scales.clone(), nearest)
    write_scales(scales.clone(), above, upwards=True)
    assert (scales_of(nearest) / scales).log2().abs().max() <= 1 / 12 + 1e-5
    assert 0 <= (scales_of(above) / scales).log2().min() + 1e-5 and (scales_of(above) / scales).log2().max() <= 1 / 6


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


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("width", [8, 33])
def test_some_rows_are_read_to_their_places_and_the_others_are_zero(name: str, width: int) -> None:
    """Twice with the same scratch: what stood there before must not be seen."""
    codec, total = make_codec(name, torch.float32), 6
    for rows, seed in (([2, 3], 0), ([0, 5], 1)):  # a key among the first half of the rows, a value among the second
        vectors = torch.randn(2, 2, width, generator=torch.Generator().manual_seed(seed))
        payload, decoded = coded(name, vectors)
        places = torch.tensor([rows, [total + row for row in rows]]).flatten()
        numbers, scales = codec.decode_at(payload, 2, width, places, total, ROOM)
        found = numbers if scales is None else numbers * scales
        expected = torch.zeros(2, total, width)
        expected[:, rows] = decoded
        assert torch.equal(found, expected)


@settings(deadline=None)
@given(
    name=st.sampled_from(ALONE),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 41)),
    size=st.floats(-12, 12),
    seed=st.integers(0, 999),
)
def test_a_round_trip_is_bounded_and_the_same_whatever_is_around_it(
    name: str, dtype: torch.dtype, shape: tuple[int, int, int], size: float, seed: int
) -> None:
    """Any shape, size and distribution: each vector's error is below what sending nothing would leave, the more bits
    the less; and other vectors or layers in the message change nothing."""
    noise = torch.Generator().manual_seed(seed)
    spiky = torch.randn(shape, generator=noise) ** (1 + 2 * (seed % 2))
    vectors = (2**size * spiky).to(dtype if name == "raw" else torch.float32)
    payload, decoded = coded(name, vectors)
    assert torch.equal(decoded[-1, -1:], coded(name, vectors[-1, -1:])[1])
    if name == "raw":
        assert torch.equal(decoded, vectors)
        return
    assert payload.shape == (shape[0], make_codec(name, dtype).size(*shape[1:]))
    error, whole = ((tensor.square().sum(-1)) ** 0.5 for tensor in (decoded - vectors, vectors))
    # Below the smallest scale nothing is promised but that scale's own error.
    smallest = 2.0**-21 * shape[2] ** 0.5
    assert (error <= BOUNDS[name] * whole.clamp_min(smallest)).all()


BOUNDS = {"int8": 1.13 / 254 * 41**0.5, "int4": 0.75, "2bit": 0.9, "1bit": 1.13}
"""Largest error of a vector, as a share of it; of Gaussian levels for the worst of distributions: one spike."""


@given(
    shape=st.tuples(st.just(2), st.integers(1, 3), st.integers(1, 40), st.integers(1, 41)),
    side=st.integers(1, 9),
    ratio=st.floats(0.01, 1.0),
    codec=st.sampled_from(list(CODECS)),
    extrapolation=st.sampled_from(["none", "fitted"]),
    tolerance=st.sampled_from([0.0, 0.1]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_the_parts_of_a_payload_do_not_overlap(
    shape: tuple[int, ...],
    side: int,
    ratio: float,
    codec: str,
    extrapolation: Extrapolation,
    tolerance: float,
    dtype: torch.dtype,
) -> None:
    table = block_table([Segment(1, shape[2])], side)
    config = OtilConfig(ratio=ratio, codec=codec, extrapolation=extrapolation, tolerance=tolerance)
    layout = PayloadLayout.of(torch.Size(shape), dtype, table, config)
    assert layout.gains == (8 if extrapolation == "fitted" else 0)
    assert layout.error - layout.gains == (4 if tolerance else 0)
    assert layout.indices - layout.error == 4 * layout.count and layout.count <= len(table)
    assert (layout.count == 0) == (ratio >= 1) and layout.vectors >= 2 * shape[1]
    needed = make_codec(codec, dtype).size(layout.vectors, shape[3])
    assert 0 <= layout.coded - layout.indices < 16 and 0 <= layout.size - layout.coded - needed < 16
    assert layout.coded % 16 == layout.size % 16 == 0


def test_kinds() -> None:
    assert isinstance(make_codec("raw", torch.float16), Raw) and not Raw(torch.float16).of_residuals
    assert [name for name in CODECS if make_codec(name, torch.float32).lossless] == ["raw"]
    assert [make_codec(name, torch.float32).bits for name in CODECS] == [32, 8, 4, 2, 1, 2]
