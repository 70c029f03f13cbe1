"""Coordinates of a layer's keys and values in which errors of equal size do equal harm.

Attention does not change when keys are multiplied by a matrix and queries by its inverse transpose, nor when values
are multiplied by one and the output projection by its inverse; real networks differ from each other by as much. So
what compares or codes keys and values works on ``y = T x`` for each head. ``|y|^2`` is an error in the metric of what
reads it: queries' weights for keys, the output projection's for values. The axes are the principal ones of what the
layer's own weights make of white input. Both follow every such change, so y does not change.

Shapes: H heads, d features of a head, C = H * d, D inputs; N patches, B batch, S tokens of one patch.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import product
from operator import mul

import torch

from otil_xdit.method.scratch import ScratchBuffers

_LEAST = 1e-6
"""Share of the whole error that a direction counts at least, where nothing that reads it sees it."""

_NOTHING, _LEFT_OUT = 2.0**-24, 2.0**-8
"""Share of the largest feature's size that is as good as 0, and the share that such a feature is taken to have: what 8
bits leave out is at most that. Divided by what is measured of it, its later values would take all bits."""


@dataclass(frozen=True)
class AttentionWeights:
    """The weights round one attention.

    Attributes:
        heads: H.
        queries, keys, values: [C, D].
        outputs: [D, C] and more columns, which read something else.
        query_norm, key_norm: of a norm of each head, [d] or [C]; both None where there is none.
        is_rotary: whether queries and keys are turned by pairs of neighbouring features.
    """

    heads: int
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    outputs: torch.Tensor
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    is_rotary: bool = False

    @property
    def state(self) -> tuple[object, ...]:
        """What changes when a weight is replaced or written to; not when it is moved."""
        parts = (self.queries, self.keys, self.values, self.outputs, self.query_norm, self.key_norm)
        return tuple((id(part), _written(part)) for part in parts if part is not None)


def _written(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Coordinates:
    """The change of coordinates of one layer's keys and values.

    Args:
        into: float32 [2, H, d, d], for keys and for values; a head's features as a row, times it, are its coordinates.
        back: its inverse.
    """

    def __init__(self, into: torch.Tensor, back: torch.Tensor) -> None:
        self.matrices = into, back

    @classmethod
    def of_weights(cls, weights: AttentionWeights) -> Coordinates | None:
        """Return the coordinates of a layer; None where its weights give none (a query that is 0, infinities)."""
        keys = _of_rotary_keys(weights) if weights.is_rotary else _axes(*_key_moments(weights))
        values = _axes(*_value_moments(weights))
        into = torch.stack([keys, values])
        found = cls(into.float(), torch.linalg.inv_ex(into).inverse.float())
        return found if all(matrix.isfinite().all() for matrix in found.matrices) else None

    @classmethod
    def unknown(cls, heads: int, size: int, device: torch.device) -> Coordinates:
        """Return the features as they are, [H, d], in memory of their own."""
        matrix = torch.eye(size, device=device).expand(2, heads, size, size)
        return cls(matrix.clone(), matrix.clone())

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices."""
        return sum(matrix.nbytes for matrix in self.matrices)

    @property
    def digest(self) -> int:
        """A number that is equal for equal coordinates."""
        return zlib.crc32(self.matrices[0].cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def of_heads(self, first: int, count: int, device: torch.device) -> Coordinates:
        """Return the coordinates of some of the heads, on a device."""
        into, back = (matrix[:, first : first + count].contiguous().to(device) for matrix in self.matrices)
        return Coordinates(into, back)

    def measure(self, squares: torch.Tensor) -> None:
        """Divide each feature by its size, rounded to a power of 2.

        Args:
            squares: of all ranks' keys and values, float32 [N, 2, B, S, C].
        """
        sizes = squares.mean(dim=(0, 2, 3)).sqrt_()
        largest = sizes.amax(dim=1, keepdim=True)
        # Of a feature that is 0 nothing is known but that a coded step has left it out, or that it begins later.
        sizes = torch.where(sizes > largest * _NOTHING, sizes, largest * _LEFT_OUT)
        self.scale(sizes.where(largest > 0, 1.0).log2_().round_().exp2_())

    def scale(self, sizes: torch.Tensor) -> None:
        """Make every coordinate a feature over its size, float32 [2, C]."""
        for matrix, scales in zip(self.matrices, (sizes.reciprocal(), sizes), strict=True):
            torch.diagonal(matrix, dim1=-2, dim2=-1).copy_(scales.view(matrix.shape[:3]))

    def into(self, values: torch.Tensor, out: torch.Tensor, scratch: ScratchBuffers) -> None:
        """Write the coordinates of keys and values, [N, 2, B, S, C], to `out`, float32 of that shape, contiguous."""
        _multiply(values, self.matrices[0], out, scratch)

    def back(self, coordinates: torch.Tensor, scratch: ScratchBuffers) -> torch.Tensor:
        """Return the keys and values of coordinates, [N, 2, B, S, C]; float32, in scratch."""
        out = scratch("coordinates.back", tuple(coordinates.shape), torch.float32)
        _multiply(coordinates, self.matrices[1], out, scratch)
        return out

    def write_back(self, coordinates: torch.Tensor, out: torch.Tensor, scratch: ScratchBuffers) -> None:
        """Write what `back` returns to `out`, [N, 2, B, S, C], whose images need not be neighbours in memory."""
        if out.dtype == torch.float32:
            _multiply(coordinates, self.matrices[1], out, scratch)
        else:
            out.copy_(self.back(coordinates, scratch))


def _multiply(values: torch.Tensor, matrices: torch.Tensor, out: torch.Tensor, scratch: ScratchBuffers) -> None:
    """Multiply the heads of [N, 2, B, S, C] by matrices, [2, H, d, d].

    Each [S, C] of `out`, float32, is contiguous.
    """
    if values.dtype != torch.float32 or not values.is_contiguous():
        values = scratch("coordinates.given", tuple(values.shape), torch.float32).copy_(values)
    ranks, _, batch, tokens, width = values.shape
    images = 1 if out.stride(2) == tokens * width else batch  # those that are neighbours are multiplied at once
    by_head = (matrices.shape[1], batch // images * tokens, matrices.shape[2]), (matrices.shape[2], width, 1)
    parts = matrices.unbind(0)
    for place in product(range(ranks), range(2), range(images)):
        given, written = (
            whole.as_strided(*by_head, whole.storage_offset() + sum(map(mul, place, whole.stride())))
            for whole in (values, out)
        )
        torch.bmm(given, parts[place[1]], out=written)


def _heads(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return [C, D] as float64 [H, d, D], on the CPU, where all ranks compute alike."""
    return weight.detach().cpu().double().unflatten(0, (heads, -1))


def _key_moments(weights: AttentionWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the metric of keys and their second moment for white input, float64 [H, d, d]."""
    queries, keys = _heads(weights.queries, weights.heads), _heads(weights.keys, weights.heads)
    metric, moment = queries @ queries.mT, keys @ keys.mT
    if weights.query_norm is None or weights.key_norm is None:
        return metric, moment
    # A norm gives every feature of a query its weight's size, and keeps how a key's features go together.
    read, given = (_norm_weights(norm, weights.heads, keys.shape[1]) for norm in (weights.query_norm, weights.key_norm))
    scales = given / moment.diagonal(dim1=-2, dim2=-1).sqrt()
    return torch.diag_embed(read.square()), moment * scales[:, :, None] * scales[:, None, :]


def _norm_weights(norm: torch.Tensor, heads: int, size: int) -> torch.Tensor:
    return norm.detach().cpu().double().view(-1, size).expand(heads, -1)


def _value_moments(weights: AttentionWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the metric of values and their second moment for white input, float64 [H, d, d]."""
    values = _heads(weights.values, weights.heads)
    readers = _heads(weights.outputs[:, : weights.values.shape[0]].mT, weights.heads)
    return readers @ readers.mT, values @ values.mT


def _axes(metric: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Return matrices M, float64 [H, d, d], where ``|x M|^2`` is the metric's and ``x M`` has uncorrelated features.

    Args:
        metric, moment: float64 [H, d, d], symmetric.
    """
    size = (metric * moment).sum(dim=(-2, -1), keepdim=True) / metric.shape[-1]
    factor = torch.linalg.cholesky_ex(metric + _LEAST * size * torch.linalg.inv_ex(moment).inverse).L
    spread = factor.mT @ moment @ factor
    if not spread.isfinite().all():
        return torch.full_like(metric, torch.nan)
    axes = torch.linalg.eigh(spread).eigenvectors
    matrices = factor @ axes
    largest = matrices.gather(-2, matrices.abs().argmax(dim=-2, keepdim=True))
    return matrices * largest.sign()  # an axis may be found either way round


def _of_rotary_keys(weights: AttentionWeights) -> torch.Tensor:
    """Return matrices, float64 [H, d, d], that only scale pairs of features: what commutes with turning them."""
    metric, moment = _key_moments(weights)
    size = (metric * moment).sum(dim=(-2, -1)) / metric.shape[-1]
    pairs = metric.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, 2)).mean(dim=-1)
    return torch.diag_embed(pairs.clamp_min(_LEAST * size[:, None]).sqrt().repeat_interleave(2, dim=-1))
