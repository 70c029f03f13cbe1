"""Compares the fused kernels with the eager code over random shapes, in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/workers/fused_kernels.py moments copies payloads group_norm

Prints a JSON object for each comparison: the largest difference relative to the largest value, and its bound.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from otil_xdit.dryrun.job import ParallelDegrees  # noqa: E402
from otil_xdit.dryrun.recorder import Log, RecordedCollectives  # noqa: E402
from otil_xdit.dryrun.stand_ins import patch_group  # noqa: E402
from otil_xdit.exchange.buckets import Bucketer  # noqa: E402
from otil_xdit.exchange.kv_payload import PayloadCodec  # noqa: E402
from otil_xdit.exchange.moments import MomentsLayer, combined_moments  # noqa: E402
from otil_xdit.method.config import OtilConfig  # noqa: E402
from otil_xdit.method.kernels import copies as copies_kernels  # noqa: E402
from otil_xdit.method.kernels import group_norm as norm_kernels  # noqa: E402
from otil_xdit.method.kernels import moments as moments_kernels  # noqa: E402
from otil_xdit.method.kernels import payloads as payload_kernels  # noqa: E402
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


def copies_cases() -> Iterator[tuple[str, float, float]]:
    """Two steps' payloads of random residuals to copies of random numbers, and what is predicted from them."""
    shapes = ((2, 2, 1, 12, 24), (1, 3, 2, 20, 48), (3, 2, 1, 16, 20))
    types = ((torch.float32, "auto"), (torch.float16, "auto"), (torch.float32, "bfloat16"))
    codecs = (("2bit", 0.5), ("int4", 0.5), ("1bit", 1.0), ("int8", 0.6), ("2bit", 1.0))
    turns = cycle(product(shapes, types))
    for (codec, ratio), rule, _ in product(codecs, ("fitted", "constant", "none"), range(2)):
        shape, (dtype, cache) = next(turns)
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
    run = slice(0, layers)
    for _ in range(2):
        received = payloads(codec, ranks, layers, one, dtype)
        found = codec.unpack(received.transpose(0, 1))
        gains = found.gains if found.gains is not None else constant_gains(layers, ranks, config)
        eager.apply_residuals(run, gains, found.numbers, found.scales, found.sent)
        codec.apply_fused(fused, run, received, copies_kernels.launch_correct_copies)
    pairs = [*zip(fused.tensors, eager.tensors, strict=True)]
    fresh = torch.randn(one).to(dtype)
    whole = [torch.empty(2, batch, ranks, tokens, width, dtype=dtype) for _ in range(2)]
    gain = torch.tensor([0.7, 0.3])
    eager.predict(0, gain, whole[1].permute(2, 0, 1, 3, 4))
    whole[1][:, :, own] = fresh
    velocity = None if fused.velocity is None else fused.velocity[0]
    copies_kernels.launch_predict_copies(fused.value[0], velocity, gain, fresh, whole[0], own)
    pairs.append((whole[0], whole[1]))
    if config.extrapolation == "fitted" and eager.velocity is not None and fused.velocity is not None:
        pairs.append(
            (
                copies_kernels.launch_fitted_gain(fused.value[0, own], fused.velocity[0, own], fresh),
                eager.gain(0, fresh),
            )
        )
    # A number in half precision may be rounded to its neighbour where sums in float32 differ in the last bit.
    half = torch.float32 not in (eager.value.dtype,)
    bound = 2 * torch.finfo(eager.value.dtype).eps if half else FLOAT32
    return max(relative(*pair) for pair in pairs), bound


def payloads_cases() -> Iterator[tuple[str, float, float]]:
    """Payloads as the others read them, of the same sub-blocks; their scores; and the share of bytes that differ."""
    shapes = ((2, 2, 1, 12, 24), (1, 3, 2, 20, 48), (3, 2, 1, 16, 20))
    codecs = (("2bit", 0.5), ("int4", 0.5), ("1bit", 1.0), ("int8", 0.6), ("2bit", 1.0))
    turns = cycle(product(shapes, (torch.float32, torch.float16)))
    for (codec, ratio), rule, _ in product(codecs, ("fitted", "constant", "none"), range(2)):
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
    for tensor in predictor.tensors:
        tensor.copy_(torch.randn(tensor.shape))
    fresh, gains = torch.randn(layers, *one).to(dtype), torch.rand(layers, 2)
    fresh[0, 0, 0, 3] = predictor.value[0, own, 0, 0, 3]  # with no gain, nothing to send
    expected, found = (torch.zeros(layers, codec.layout.size, dtype=torch.uint8) for _ in range(2))
    own_copy = torch.empty(layers, *one)
    predictor.predict_own(run, gains, own_copy)
    residual = fresh.float() - own_copy
    changes = payload_kernels.launch_block_changes(*predictor.own_copies(run), fresh, gains, table)
    error = relative(changes, l2_of_difference(residual, table))
    selected = changes.topk(codec.layout.count).indices.contiguous() if codec.layout.count else None
    codec.encode_fused(predictor, run, fresh, gains, found, selected, payload_kernels.launch_encode_residuals)
    codec.pack_gains(expected, gains)
    tokens_sent = residual if selected is None else codec.pack_selected(expected, selected, residual)
    codec.pack_tokens(expected, tokens_sent.clone())
    differing = (expected != found).float().mean().item()  # numbers beside a border may fall to its other side
    return max(error, differing), 2e-3


def payloads(codec: PayloadCodec, ranks: int, layers: int, one: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Random residuals of every rank, uint8 [N, l, size]."""
    layout = codec.layout
    received = torch.zeros(ranks, layers, layout.size, dtype=torch.uint8)
    for payload in received:
        codec.pack_gains(payload, torch.rand(layers, 2))
        residual = 0.3 * torch.randn(layers, *one)
        if layout.count:
            blocks = codec._table.shape[0]
            selected = torch.stack([torch.randperm(blocks)[: layout.count] for _ in range(layers)])
            residual = codec.pack_selected(payload, selected, residual)
        codec.pack_tokens(payload, residual)
    return received


def constant_gains(layers: int, ranks: int, config: OtilConfig) -> torch.Tensor:
    constant = config.extrapolation_gain if config.extrapolation == "constant" else 0.0
    return torch.full((layers, ranks, 2), constant)


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
    tokens, norm = torch.randn(2, 15, 16).transpose(1, 2), nn.GroupNorm(4, 16)  # as a VAE's attention normalises
    mean, var = norm_kernels.launch_group_moments(tokens, 4)
    found = norm_kernels.launch_normalise(tokens, mean, var, norm.weight, norm.bias, norm.eps)
    with torch.no_grad():
        yield "norm of tokens", relative(found, norm(tokens)), 2 * FLOAT32
    for ranks in (2, 3, 5):
        layer, share = late_layer(ranks, 0, 2, 6, 0.0), torch.rand(ranks)
        layer._received.copy_(torch.rand(ranks, 2, 2, 6))
        pairs = zip(
            norm_kernels.launch_combine_moments(layer._received, share),
            combined_moments(layer._received, share),
            strict=True,
        )
        yield f"combined from {ranks} ranks", max(relative(*pair) for pair in pairs), FLOAT32


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
