r"""Compares the fused kernels with the eager code over random shapes, in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/workers/fused_kernels.py moments own chosen copies gathered payloads \
        group_norm rows vectors

Prints a JSON object for each comparison: the largest difference relative to the largest value, and its bound.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from otil_xdit.dryrun.job import ParallelDegrees  # noqa: E402
from otil_xdit.dryrun.recorder import Log, RecordedCollectives  # noqa: E402
from otil_xdit.dryrun.stand_ins import patch_group  # noqa: E402
from otil_xdit.exchange.buckets import Bucketer  # noqa: E402
from otil_xdit.exchange.known_moments import combined_moments  # noqa: E402
from otil_xdit.exchange.kv_kernels import PayloadKernels  # noqa: E402
from otil_xdit.exchange.kv_payload import PayloadCodec  # noqa: E402
from otil_xdit.exchange.moments import MomentsLayer  # noqa: E402
from otil_xdit.method.codec import Quantised  # noqa: E402
from otil_xdit.method.codecs import make_codec  # noqa: E402
from otil_xdit.method.config import OtilConfig  # noqa: E402
from otil_xdit.method.coordinates import Coordinates  # noqa: E402
from otil_xdit.method.gain_trend import SHARE, add, follow  # noqa: E402
from otil_xdit.method.kernels import group_norm as norm_kernels  # noqa: E402
from otil_xdit.method.kernels import moments as moments_kernels  # noqa: E402
from otil_xdit.method.kernels.adaptive import launch_encode_adaptive  # noqa: E402
from otil_xdit.method.kernels.choices import launch_settle  # noqa: E402
from otil_xdit.method.kernels.copies import launch_correct_copies  # noqa: E402
from otil_xdit.method.kernels.gathered import launch_set_coded, launch_set_gathered  # noqa: E402
from otil_xdit.method.kernels.joined_rows import launch_join_rows  # noqa: E402
from otil_xdit.method.kernels.others import launch_write_others  # noqa: E402
from otil_xdit.method.kernels.own import launch_take_own  # noqa: E402
from otil_xdit.method.kernels.payloads import launch_encode_residuals  # noqa: E402
from otil_xdit.method.kernels.rows import launch_pack_rows, launch_pad_rows  # noqa: E402
from otil_xdit.method.kernels.tiles import ChangeSums, Tiles  # noqa: E402
from otil_xdit.method.kernels.vectors import launch_decode_vectors, launch_encode_vectors  # noqa: E402
from otil_xdit.method.predictor import Predictor  # noqa: E402
from otil_xdit.method.scores import l2_of_difference  # noqa: E402
from otil_xdit.method.scratch import ScratchBuffers  # noqa: E402

FLOAT32 = 2e-6
"""Sums in another order."""


def main() -> None:
    torch.manual_seed(0)
    for kernel in sys.argv[1:]:
        for case, error, bound in globals()[f"{kernel}_cases"]():
            print(json.dumps({"kernel": kernel, "case": case, "error": error, "bound": bound}), flush=True)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.float() - expected.float()).abs().max()
    return (difference / expected.float().abs().max().clamp_min(1e-6)).item()


def moments_cases() -> Iterator[tuple[str, float, float]]:
    """Four late steps of a layer, by either way, each step with everybody's new moments."""
    for ranks, batch, groups, gain in product((2, 3, 5), (1, 3), (4, 6), (0.75, 0.0)):
        own = ranks - 1
        layers = [late_layer(ranks, own, batch, groups, gain) for _ in range(2)]
        layers[1]._corrected = partial(by_kernel, layers[1])
        share = torch.rand(ranks)
        share /= share.sum()
        worst = 0.0
        for step in range(5):
            everybody = torch.rand(ranks, 2, batch, groups) + 1.5
            now = torch.rand(2, batch, groups) + (1.5 if step < 4 else -0.5)
            found = []
            for layer in layers:
                layer._begin_reception()
                layer._received.copy_(everybody)
                found.append(torch.stack(layer._corrected(*now, share, extrapolate=step != 2)))
            worst = max(worst, relative(found[1], found[0]), relative(layers[1]._assumed, layers[0]._assumed))
            worst = max(worst, relative(layers[1]._sent, layers[0]._sent))
        yield f"{ranks} ranks, {batch} x {groups}, gain {gain}", worst, 2e-5


SHAPES = ((2, 2, 1, 12, 24), (1, 3, 2, 20, 40), (3, 2, 1, 16, 20))
"""Layers, ranks, batch, tokens and features of small cases."""

RULES = ("fitted", "constant", "none")

CODED = (
    *(("adaptive", 0.5, rule) for rule in RULES),
    ("adaptive", 1.0, "fitted"),
    ("2bit", 0.5, "constant"),
    ("int4", 0.5, "fitted"),
    ("1bit", 1.0, "none"),
    ("int8", 0.6, "fitted"),
    ("2bit", 1.0, "fitted"),
)
"""Codecs, ratios and rules of extrapolation."""


def copies_cases() -> Iterator[tuple[str, float, float]]:
    """Two steps' payloads of random residuals to copies of random numbers."""
    types = ((torch.float32, "auto"), (torch.float16, "auto"), (torch.float32, "bfloat16"))
    turns = cycle(zip(cycle(SHAPES), (*types, *types[1:], types[0]), strict=False))
    alone = (("adaptive", 0.5, "fitted"), ("adaptive", 1.0, "constant"))  # a layer that attention waits for
    cases = [
        *((case, next(turns)) for case in CODED),
        (CODED[0], (SHAPES[0], (torch.float32, "float8"))),
        *((case, (SHAPES[1], types[n])) for n, case in enumerate(alone)),
    ]
    for (codec, ratio, rule), (shape, (dtype, cache)) in cases:
        config = OtilConfig(codec=codec, ratio=ratio, extrapolation=rule, kv_cache_dtype=cache, block_size=2)
        yield f"{shape}, {dtype}, {cache}, {codec}, {ratio}, {rule}", *copies_case(shape, dtype, config)


def copies_case(shape: tuple[int, ...], dtype: torch.dtype, config: OtilConfig) -> tuple[float, float]:
    layers, ranks, batch, tokens, width = shape
    scratch = ScratchBuffers(torch.device("cpu"))
    own = ranks - 1
    one = torch.Size((2, batch, tokens, width))
    table = torch.randperm(tokens).view(-1, 4)
    table[-1] = table[0]  # tokens that are sent twice, as where sub-blocks overlap
    table[-1, 2:] = torch.tensor([token for token in range(tokens) if token not in table[:-1]])[:2]
    codec = PayloadCodec(one, dtype, table, config, scratch)
    codec.allocate(layers, ranks)
    eager, fused = (Predictor(torch.empty(layers, *one, dtype=dtype), ranks, own, config, scratch) for _ in range(2))
    for tensor, twin in zip(eager.tensors, fused.tensors, strict=True):
        tensor.copy_(torch.randint(1, 4, tensor.shape) if tensor.ndim == 3 else torch.randn(tensor.shape))
        twin.copy_(tensor)
    run, heads, whole, pairs = slice(0, layers), 2, None, list[tuple[torch.Tensor, torch.Tensor]]()
    coordinates = Coordinates(*(torch.randn(2, heads, width // heads, width // heads) for _ in range(2)))
    if config.uses_coordinates and layers == 1:  # as attention waits for them
        whole = torch.randn(2, batch, ranks, tokens, width).to(dtype)
    writing = {"matrices": coordinates.matrices[1], "out": whole, "heads": heads, "own": own}
    for _ in range(2):
        received = payloads(codec, ranks, layers, one, dtype)
        found = codec.unpack(received.transpose(0, 1))
        gains = found.gains if found.gains is not None else constant_gains(layers, ranks, config)
        eager.apply_residuals(run, gains, found.numbers, found.scales, found.sent)
        kernels = PayloadKernels(codec.layout, make_codec(config.codec, dtype), one, table)
        if whole is None:
            kernels.apply(fused, run, received, launch_correct_copies)
        else:
            read = kernels.read(fused, run, received)
            kernels.advance(fused, run, read, "others", own, writing)
            following = kernels.following(fused, read, own)
            pairs.append(compared_with_own(fused, coordinates, following, heads, dtype))
        for tensor, twin in zip(eager.tensors, fused.tensors, strict=True):
            pairs.append((twin.clone(), tensor.clone()))
            twin.copy_(tensor)  # a number that was rounded to its neighbour is that far off; not the next step's, too
    if whole is not None:
        expected = coordinates.back(eager.value[0], scratch).permute(1, 2, 0, 3, 4)
        expected = torch.cat([expected[:, :, :own], whole[:, :, own:]], dim=2)
        pairs.append((whole, expected.to(dtype)))
    error, bound = worst(pairs, eager.value.dtype)
    return error, bound * (1 if whole is None else 4)  # products of many numbers


def compared_with_own(
    fused: Predictor,
    coordinates: Coordinates,
    following: dict[str, Any],
    heads: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Have a rank's own copies of one layer follow a payload when they are compared with what it is called with.

    Returns:
        How far that is from them, and how far it is by eager code from the copies that have followed.
    """
    copies, velocities = (None if part is None else part[0] for part in fused.own_copies(slice(0, 1)))
    assert copies is not None, "values are always kept"
    _, batch, tokens, width = copies.shape
    fresh = torch.randn(2, batch, heads, tokens, width // heads).to(dtype)
    sums = ChangeSums.make(1, batch, tokens, torch.device("cpu"))
    taken, coded = torch.empty(copies.shape), torch.empty(1, *copies.shape)
    gains = torch.rand(2).half().float()
    launch_take_own(
        *fresh, coordinates.matrices[0], None, taken, sums.numbers[0], True, copies, velocities,
        gains, torch.empty(2), None, sums.tokens[0], sums.totals[0], **following,
    )  # fmt: skip
    coordinates.into(fresh.transpose(2, 3).flatten(3)[None], coded, ScratchBuffers(torch.device("cpu")))
    expected = torch.empty_like(coded)
    fused.residual_of(slice(0, 1), coded, gains[None], expected)
    return taken, expected[0]


def worst(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest error of some tensors, and the bound of it; of 8 bits as if these were as fine as `dtype`."""

    # A number in half precision may be rounded to its neighbour where sums in float32 differ in the last bit.
    def bound(kind: torch.dtype) -> float:
        return FLOAT32 if kind == torch.float32 else 2 * torch.finfo(kind).eps

    of_dtype = bound(dtype)
    coarse = (min(1.0, of_dtype / bound(found.dtype)) if found.dtype.itemsize == 1 else 1.0 for found, _ in pairs)
    return max(relative(*pair) * share for pair, share in zip(pairs, coarse, strict=True)), of_dtype


def gathered_cases() -> Iterator[tuple[str, float, float]]:
    """Two synchronous steps of one layer: what everybody sends, what the copies become and what attention reads."""
    heads, types = ((3, 8), (2, 20), (1, 40)), (torch.float32, torch.float16, torch.bfloat16)
    turns = cycle(zip(heads, types, SHAPES, strict=True))
    for codec, rule, turned in (*product(("int8", "raw"), RULES[1:], (True, False)), ("int4", "fitted", True)):
        (number, size), dtype, (_, ranks, batch, tokens, _) = next(turns)
        config = OtilConfig(warmup_codec=codec, extrapolation=rule, ratio=0.5)
        name = f"{ranks} ranks, {batch} x {number} x {tokens} x {size}, {dtype}, {codec}, {rule}, {turned}"
        for case, error, bound in gathered_case(ranks, (batch, number, tokens, size), dtype, config, turned):
            yield f"{name}: {case}", error, bound


def gathered_case(
    ranks: int, of_key: tuple[int, int, int, int], dtype: torch.dtype, config: OtilConfig, turned: bool
) -> Iterator[tuple[str, float, float]]:
    batch, heads, tokens, size = of_key
    one, own, scratch = torch.Size((2, batch, tokens, heads * size)), ranks - 1, ScratchBuffers(torch.device("cpu"))
    eager, fused = (Predictor(torch.empty(1, *one, dtype=dtype), ranks, own, config, scratch) for _ in range(2))
    coordinates = Coordinates(*(torch.randn(2, heads, size, size) / size**0.5 for _ in range(2)))
    into, back = coordinates.matrices if turned else (None, None)
    codec, vectors = make_codec(config.warmup_codec, dtype), one[:-1].numel()
    differ, pairs = 0.0, list[tuple[torch.Tensor, torch.Tensor]]()
    for step in range(2):
        values = torch.randn(ranks, *one).to(dtype)
        coded = values.float()
        if turned:
            coordinates.into(values, coded, scratch)
        whole = torch.randn(2, batch, ranks, tokens, heads * size).to(dtype)
        expected = values.permute(1, 2, 0, 3, 4)
        if codec.lossless:
            eager.set_values(0, coded)
            fused.set_by_kernel(0, partial(launch_set_gathered, values, matrices=into, out=whole, heads=heads))
        else:
            known = eager.last_values(0).clone()
            received = torch.empty(ranks, codec.size(vectors, one[-1]), dtype=torch.uint8)
            for rank, changes in enumerate(coded - known):
                codec.encode(changes.clone().view(vectors, -1), received[rank], scratch)
            encoding, decoding = codec.kernel_arguments(received.device, vectors, one[-1])
            sent = torch.empty(1, received.shape[1], dtype=torch.uint8)
            last = fused.own_copies(slice(0, 1))[0] if fused.is_known(0) else None
            change = coded[own] if last is None else coded[own] - last[0].float()
            launch_encode_residuals(
                change[None], None, None, sent, None, torch.arange(tokens)[:, None], indices_at=0,
                coded_at=0, travels=False, **encoding,
            )  # fmt: skip
            differ = max(differ, (sent[0] != received[own]).float().mean().item())
            numbers, scales = codec.decode(received, vectors, one[-1], scratch)
            eager.set_values(0, known.addcmul_(numbers.view_as(known), scales.view(ranks, *one[:-1], 1)))
            arguments = {"received": received, **decoding, "matrices": back, "out": whole, "heads": heads, "own": own}
            fused.set_by_kernel(0, partial(launch_set_coded, **arguments))
            changed = coordinates.back(eager.value[0], scratch) if turned else eager.value[0]
            expected = torch.cat([changed.to(dtype).permute(1, 2, 0, 3, 4)[:, :, :own], whole[:, :, own:]], dim=2)
        pairs += [(fused.value.clone(), eager.value.clone()), (whole, expected)]
        if step > 0 and eager.velocity is not None:
            assert fused.velocity is not None, "both have one"
            pairs.append((fused.velocity.clone(), eager.velocity.clone()))
        for tensor, twin in zip(eager.tensors, fused.tensors, strict=True):
            if tensor.ndim == 3:  # as if some tokens had not been sent
                tensor.copy_(torch.randint(1, 4, tensor.shape))
            twin.copy_(tensor)
    error, bound = worst(pairs, dtype)
    yield "copies", error, 10 * bound if dtype == torch.float32 else 4 * bound  # products of many numbers
    if not codec.lossless:
        yield "share of bytes that differ", differ, 2e-3


def payloads_cases() -> Iterator[tuple[str, float, float]]:
    """Payloads as the others read them, of the same sub-blocks, and the share of bytes that differ."""
    turns = cycle(product(SHAPES, (torch.float32, torch.float16)))
    for codec, ratio, rule in CODED:
        shape, dtype = next(turns)
        config = OtilConfig(codec=codec, ratio=ratio, extrapolation=rule, block_size=2)
        yield f"{shape}, {dtype}, {codec}, {ratio}, {rule}", *payloads_case(shape, dtype, config)


def payloads_case(shape: tuple[int, ...], dtype: torch.dtype, config: OtilConfig) -> tuple[float, float]:
    layers, ranks, batch, tokens, width = shape
    scratch = ScratchBuffers(torch.device("cpu"))
    own, one, run = ranks - 1, torch.Size((2, batch, tokens, width)), slice(0, layers)
    table = torch.randperm(tokens).view(-1, 4)
    codec = PayloadCodec(one, dtype, table, config, scratch)
    codec.allocate(layers, ranks)
    predictor = Predictor(torch.empty(layers, *one, dtype=dtype), ranks, own, config, scratch)
    uneven = torch.randn(width).mul(1.5).exp()
    for tensor in predictor.tensors:
        tensor.copy_(torch.randn(tensor.shape) * (uneven if tensor.shape[-1] == width else 1))
    fresh = (torch.randn(layers, *one) * uneven).to(dtype)
    gains, fitted = torch.rand(2, layers, 2)
    fresh[0, 0, 0, 3] = predictor.value[0, own, 0, 0, 3]  # with no gain, nothing to send
    expected, found = (torch.zeros(layers, codec.layout.size, dtype=torch.uint8) for _ in range(2))
    residual = torch.empty(layers, *one)
    predictor.residual_of(run, fresh, gains, residual)
    count = codec.layout.count
    selected = torch.stack([torch.randperm(len(table))[:count] for _ in range(layers)]) if count else None
    encode = launch_encode_adaptive if config.uses_coordinates else launch_encode_residuals
    sizes = residual.square().unflatten(3, (2, -1)).sum(4).permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()
    kernels = PayloadKernels(codec.layout, make_codec(config.codec, dtype), one, table)
    kernels.encode(residual, sizes, gains, fitted, found, selected, encode)
    codec.pack_gains(expected, gains, fitted)
    tokens_sent = residual if selected is None else codec.pack_selected(expected, selected, residual)
    codec.pack_tokens(expected, tokens_sent.clone(), codec.sizes(residual) if codec.by_feature else None)
    # A number beside a border may fall to its other side.
    return (expected != found).float().mean().item(), 2e-3


def own_cases() -> Iterator[tuple[str, float, float]]:
    """What is read of a rank's own keys and values, what follows from it, and what attention reads of the others'."""
    heads = ((3, 8), (2, 20), (1, 40))
    types = (torch.float32, torch.float16, torch.bfloat16)
    turns = cycle(zip(heads, types, SHAPES, strict=True))
    for rule, turned, count in (*product(RULES[:2], (True, False), (3,)), ("none", True, 0), ("none", False, 3)):
        (number, size), dtype, (layers, ranks, batch, tokens, _) = next(turns)
        config = OtilConfig(extrapolation=rule, block_size=2)
        name = f"{layers} layers, {ranks} ranks, {batch} x {number} x {tokens} x {size}, {dtype}, {rule}, {turned}"
        case = own_case(layers, ranks, (batch, number, tokens, size), dtype, config, turned, count)
        yield f"{name}, {count} chosen", *case


def own_case(
    layers: int,
    ranks: int,
    of_key: tuple[int, int, int, int],
    dtype: torch.dtype,
    config: OtilConfig,
    turned: bool,
    count: int,
) -> tuple[float, float]:
    batch, heads, tokens, size = of_key
    one, own = torch.Size((2, batch, tokens, heads * size)), ranks - 1
    scratch = ScratchBuffers(torch.device("cpu"))
    predictor = Predictor(torch.empty(layers, *one, dtype=dtype), ranks, own, config, scratch)
    for tensor in predictor.tensors:
        tensor.copy_(torch.randn(tensor.shape))
    coordinates = Coordinates(*(torch.randn(2, heads, size, size) / size**0.5 for _ in range(2)))
    into, back = coordinates.matrices if turned else (None, None)
    table = torch.randperm(tokens).view(-1, 4)
    sums = ChangeSums.make(layers, batch, tokens, torch.device("cpu"))
    taken, residual = torch.empty(layers, *one, dtype=dtype), torch.empty(layers, *one)
    constant = config.extrapolation_gain if config.extrapolation == "constant" else 0.0
    fitted = config.extrapolation == "fitted"
    before = torch.rand(layers, 2) if fitted else torch.full((layers, 2), constant)
    gains, known, found, pairs = before.clone(), before.clone(), torch.empty(layers, 2), []
    sizes = torch.empty(layers, Tiles.of(batch, tokens).tiles, 2 * batch, heads * size)
    whole = [torch.zeros(2, batch, ranks, tokens, heads * size, dtype=dtype) for _ in range(2)]
    for layer in range(layers):
        key, value = (torch.randn(batch, tokens, heads, size).to(dtype).transpose(1, 2) for _ in range(2))
        fresh = torch.stack([key, value]).transpose(2, 3).flatten(3)
        expected = fresh.float().clone()
        if turned:
            coordinates.into(fresh[None], expected[None], scratch)
        copies, velocities = predictor.own_copies(slice(layer, layer + 1))
        velocity = None if velocities is None else velocities[0]
        trend = torch.tensor([0.4, -0.7, 1.8]) if fitted and layer > 0 else None
        told = before[layer].clone() if trend is None else follow(trend, before[layer])
        told = told.half().float() if fitted else told
        launch_take_own(
            key, value, into, whole[0][:, :, own], taken[layer], sums.numbers[layer], layer > 0, copies[0], velocity,
            before[layer], gains[layer].zero_(), trend, sums.tokens[layer], sums.totals[layer], sizes[layer],
            fitted=fitted,
        )  # fmt: skip
        whole[1][:, :, own] = fresh
        predictor.residual_of(slice(layer, layer + 1), expected[None], told[None], residual[layer : layer + 1])
        known[layer] = predictor.fitted_gain(layer, residual[layer], told)
        coded = residual[layer] if layer > 0 else expected
        squares = residual[layer].square().sum(2).flatten(0, 1)
        pairs += [(taken[layer], coded.to(dtype)), (sums.numbers[layer].sum(), fresh.float().sum())]
        pairs += [
            (sizes[layer].sum(0), squares),
            (gains[layer], told if velocity is not None else known[layer] * 0),
        ]
        predicted = torch.empty(ranks, *one)
        predictor.predict_others(layer, known[layer], predicted)
        totals = sums.totals[layer] if fitted else None
        velocity = None if predictor.velocity is None else predictor.velocity[layer]
        known_gains = None if velocity is None else gains[layer]
        launch_write_others(predictor.value[layer], velocity, back, totals, known_gains, whole[0], heads, own)
        written = coordinates.back(predicted, scratch) if turned else predicted.clone()
        written[own] = fresh.float()
        whole[1].copy_(written.permute(1, 2, 0, 3, 4))
        pairs.append((whole[0], whole[1]))
    scores = torch.empty(layers, len(table))
    gains, expecting = gains if fitted else before, torch.empty(layers, 2)
    selected = launch_settle(sums.tokens, sums.totals, gains, found, expecting, scores, table, None, fitted, count)
    expected = l2_of_difference(residual, table)
    pairs += [(found, known), (scores, expected), (expecting, torch.lerp(gains, known, SHARE))]
    trend, last = torch.rand(3), before[-1:].clone()  # of one layer alone
    added = trend.clone()
    given = sums.tokens[-1:], sums.totals[-1:], gains[-1:], torch.empty(1, 2), last, torch.empty(1, 0), None
    launch_settle(*given, trend, fitted, 0)
    add(added, found[-1], before[-1])
    pairs += [(trend, added), (last, expecting[-1:])]
    if count:
        pairs.append((selected, scores.topk(count).indices.sort().values))
    error, bound = worst(pairs, dtype)
    return error, 10 * bound if dtype == torch.float32 else bound  # products of many numbers


def chosen_cases() -> Iterator[tuple[str, float, float]]:
    """Which sub-blocks are chosen: as many as are asked for, the largest, and of equal ones the first."""
    for blocks, count, distinct in product((5, 64, 700), (1, 5), (True, False)):
        sums = torch.rand(2, 1, 2, blocks) if distinct else torch.randint(0, 3, (2, 1, 2, blocks)).float()
        table, totals, gains = torch.arange(blocks)[:, None], torch.zeros(2, 2, 1, 2), torch.empty(2, 2)
        scores, before = torch.empty(2, blocks), torch.rand(2, 2)
        selected = launch_settle(sums, totals, before, gains, gains.clone(), scores, table, None, False, count)
        expected = sums[:, 0].sum(1)
        order = expected.sort(dim=1, descending=True, stable=True).indices[:, :count].sort().values
        yield f"{count} of {blocks}, {distinct}", max(relative(scores, expected), relative(selected, order)), FLOAT32


def payloads(codec: PayloadCodec, ranks: int, layers: int, one: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Random residuals of every rank, uint8 [N, l, size]."""
    layout = codec.layout
    received = torch.zeros(ranks, layers, layout.size, dtype=torch.uint8)
    for payload in received:
        codec.pack_gains(payload, *torch.rand(2, layers, 2))
        residual = 0.3 * torch.randn(layers, *one) * torch.randn(one[-1]).mul(1.5).exp()  # features of 0 to 8 bits
        if layout.count:
            blocks = codec._table.shape[0]
            selected = torch.stack([torch.randperm(blocks)[: layout.count] for _ in range(layers)])
            residual = codec.pack_selected(payload, selected, residual)
        codec.pack_tokens(payload, residual, None)
    return received


def constant_gains(layers: int, ranks: int, config: OtilConfig) -> torch.Tensor:
    constant = config.extrapolation_gain if config.extrapolation == "constant" else 0.0
    return torch.full((layers, ranks, 2, 2), constant)


def group_norm_cases() -> Iterator[tuple[str, float, float]]:
    """Moments, their combination, and what is normalised, of maps in either memory format."""
    formats = (torch.contiguous_format, torch.channels_last)
    for batch, (channels, groups), dtype, memory_format, affine in product(
        (1, 2), ((16, 4), (24, 8)), (torch.float32, torch.float16), formats, (True, False)
    ):
        x = (torch.randn(batch, channels, 6, 10) + 3).to(dtype).contiguous(memory_format=memory_format)
        norm = nn.GroupNorm(groups, channels, affine=affine).to(dtype)
        if affine:
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        mean, var = norm_kernels.launch_group_moments(x, groups)
        values = x.reshape(batch, groups, -1).float()
        found = norm_kernels.launch_normalise(x, mean, var, norm.weight, norm.bias, norm.eps)
        assert found.stride() == x.stride() and found.dtype == dtype
        error = max(relative(mean, values.mean(2)), relative(var, values.var(2, correction=0)))
        yield f"moments of {tuple(x.shape)}, {dtype}, {memory_format}", error, FLOAT32
        bound = 2 * FLOAT32 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        with torch.no_grad():
            yield f"norm of {tuple(x.shape)}, {dtype}, {memory_format}, {affine}", relative(found, norm(x)), bound
            wide = torch.randn(batch, channels, 9, 10).to(dtype).contiguous(memory_format=memory_format)
            before, inside = wide.clone(), wide[:, :, 1:7]
            norm_kernels.launch_activate_into(x, mean, var, norm.weight, norm.bias, norm.eps, inside)
            expected = torch.cat([before[:, :, :1], functional.silu(norm(x)), before[:, :, 7:]], dim=2)
            yield f"SiLU of {tuple(x.shape)}, {dtype}, {memory_format}, {affine}", relative(wide, expected), 2 * bound
    tokens, norm = torch.randn(2, 15, 16).transpose(1, 2), nn.GroupNorm(4, 16)  # as a VAE's attention normalises
    mean, var = norm_kernels.launch_group_moments(tokens, 4)
    found = norm_kernels.launch_normalise(tokens, mean, var, norm.weight, norm.bias, norm.eps)
    with torch.no_grad():
        yield "norm of tokens", relative(found, norm(tokens)), 2 * FLOAT32
    for ranks in (2, 3, 5):
        layer, share = late_layer(ranks, 0, 2, 6, 0.0), torch.rand(ranks)
        layer._received.copy_(torch.rand(ranks, 2, 2, 6))
        came = torch.rand(2, 2, 6)
        for other, moments in ((0, None), (1, came)):
            received = layer._received.clone()
            found = norm_kernels.launch_combine_moments(received, share, moments, other)
            expected = combined_moments(layer._received, share, None if moments is None else (other, moments))
            error, bound = worst([*zip(found, expected, strict=True), (received, layer._received)], torch.float32)
            yield f"combined from {ranks} ranks, {moments is None}", error, bound


def rows_cases() -> Iterator[tuple[str, float, float]]:
    """Maps between rows that are kept, given or moved on, and rows packed with moments, in either memory format."""
    formats, sides = (torch.contiguous_format, torch.channels_last), ("kept", "given", "moved")
    turns = cycle(product(formats, ((1, 1), (1, 0), (0, 1))))
    for above, below, dtype in product(sides, sides, (torch.float32, torch.float16)):
        memory_format, (upper, lower) = next(turns)
        x = torch.randn(2, 6, 5, 7).to(dtype).contiguous(memory_format=memory_format)
        out = torch.empty(2, 6, 5 + upper + lower, 7, dtype=dtype).contiguous(memory_format=memory_format)
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        expected, given = [], list[torch.Tensor | None]()
        for side, count in ((above, upper), (below, lower)):
            last, before = (torch.randn(2, 6, count, 7).to(dtype) for _ in range(2))
            rows = torch.randn(2, 6, count, 7).to(dtype).contiguous(memory_format=memory_format)
            moved = torch.lerp(before, last, 1.75)
            expected.append({"kept": last.clone(), "given": rows, "moved": moved}[side])
            kept.append((last, before))
            given.append(rows if side == "given" else None)
        moves = above == "moved", below == "moved"
        joined, ours = out.clone(), [(last.clone(), before) for last, before in kept]
        joined[:, :, upper : upper + 5] = x
        ends = joined[:, :, :upper], joined[:, :, upper + 5 :]
        launch_join_rows(*ends, *ours[0], given[0], *ours[1], given[1], 0.75, *moves)
        launch_pad_rows(x, out, *kept[0], given[0], *kept[1], given[1], 0.75, *moves)
        pairs = [(out, torch.cat([expected[0], x, expected[1]], dim=2)), (joined, out)]
        pairs += [(mine, last) for (mine, _), (last, _) in zip(ours, kept, strict=True) if last.numel()]
        pairs += [
            (last, rows) for (last, _), rows in zip(kept, given, strict=True) if rows is not None and len(rows[0, 0])
        ]
        yield f"{above}, {below}, {dtype}, {memory_format}", *worst(pairs, dtype)
    for (up, down), memory_format in product(((1, 1), (1, None), (None, 2)), formats):
        x, moments = torch.randn(2, 6, 5, 7).contiguous(memory_format=memory_format), torch.rand(2, 2, 4)
        sides = [None if up is None else x[:, :, :up], None if down is None else x[:, :, 5 - down :]]
        sent = [None if rows is None else torch.empty(rows.shape) for rows in sides]
        copies = [torch.empty(2, 2, 4) for _ in range(2)]
        launch_pack_rows(*moments, *copies, sides[0], sent[0], sides[1], sent[1])
        pairs = [(copy, moments) for copy in copies]
        pairs += [
            (found, rows) for found, rows in zip(sent, sides, strict=True) if found is not None and rows is not None
        ]
        yield f"packed {up}, {down}, {memory_format}", *worst(pairs, torch.float32)


def vectors_cases() -> Iterator[tuple[str, float, float]]:
    """Vectors of very different sizes in 8 bits, and the same bytes read."""
    scratch, codec = ScratchBuffers(torch.device("cpu")), Quantised(8)
    types = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    for (count, width), dtype in product(((1, 64), (16, 64), (37, 64), (300, 32)), types):
        vectors = (torch.randn(count, width) * torch.randn(count, 1).mul(4).exp()).clamp(-6e4, 6e4).to(dtype)
        vectors[count // 2] = 0
        expected, found = (torch.empty(codec.size(count, width), dtype=torch.uint8) for _ in range(2))
        codec.encode(vectors.float().clone(), expected, scratch)
        encoding, decoding = codec.kernel_arguments(found.device, count, width)
        kept = {name: given for name, given in encoding.items() if name not in ("bits", "borders")}
        launch_encode_vectors(vectors, *codec.split(found, count, width), **kept)
        # A number beside a border may fall to its other side.
        name = f"{count} x {width}, {dtype}"
        yield f"{name}: share of bytes that differ", (expected != found).float().mean().item(), 2e-3
        numbers, scales = codec.decode(expected, count, width, scratch)
        read = torch.full_like(vectors, 7)
        launch_decode_vectors(*codec.split(expected, count, width), read, **decoding)
        meant = (numbers * scales).to(dtype)
        if dtype == torch.bfloat16:  # which the interpreter cuts off, where a card rounds
            yield f"{name}: numbers", ((read - meant).abs() / meant.abs().clamp_min(1e-30)).max().item(), 2**-7
        else:
            yield f"{name}: numbers that differ", (read != meant).float().mean().item(), 0.0


def late_layer(ranks: int, own: int, batch: int, groups: int, gain: float) -> Any:
    collectives = RecordedCollectives(patch_group(ParallelDegrees(patches=ranks), own), 1.0, log=Log())
    bucketer = Bucketer(collectives, ScratchBuffers)
    return MomentsLayer(collectives, bucketer, torch.zeros(batch, groups), gain)


def by_kernel(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the layer's fused way with the kernel itself in the place of its operator, which is for CUDA."""
    operator = moments_kernels.correct_moments
    moments_kernels.correct_moments = moments_kernels.launch_correct_moments
    try:
        return layer._corrected_by_kernel(*args, **kwargs)
    finally:
        moments_kernels.correct_moments = operator


if __name__ == "__main__":
    main()
