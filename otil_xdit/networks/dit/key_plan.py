"""Which keys of an attention call are real, which are sent, and which stay here.

A rank's sequence is made of as many chunks as the Ulysses degree says, one behind the other, and a chunk of the shares
of the sequence's parts (`otil_xdit.catalog.architectures`). Shares may be padded, and text that every rank has a copy
of is neither sent nor attended to twice.

Shapes: S keys of this rank, U chunks in them, N ranks that share the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from otil_xdit.catalog.architectures import Part, Sequence
from otil_xdit.networks.dit.token_counts import Counts, Tokens

Kept = torch.Tensor | tuple[torch.Tensor, ...]
"""int64, positions of the keys that may be attended to, or those of each sample."""


@dataclass(frozen=True)
class KeyPlan:
    """What to do with the keys of one attention call.

    Attributes:
        sent: int64, positions in this rank's sequence of what other patches get; None for all.
        own: int64, positions of what stays here and stands before what is gathered; None for nothing.
        kept: positions of the real keys in `own` and the gathered ones; None for all.
    """

    sent: torch.Tensor | None = None
    own: torch.Tensor | None = None
    kept: Kept | None = None

    def to(self, device: torch.device) -> KeyPlan:
        """Return the plan with its positions on `device`."""
        kept = self.kept
        if isinstance(kept, tuple):
            kept = tuple(one.to(device) for one in kept)
        elif kept is not None:
            kept = kept.to(device)
        sent, own = (None if one is None else one.to(device) for one in (self.sent, self.own))
        return KeyPlan(sent, own, kept)


@dataclass(frozen=True)
class _Share:
    """A chunk's share of a part: `size` tokens from `start` on, of `tokens` in all."""

    start: int
    size: int
    tokens: Tokens
    is_copy: bool


def plan_keys(parts: Sequence, counts: Counts, keys: int, chunks: int, ranks: int) -> KeyPlan:
    """Return what to do with the keys of an attention call.

    Args:
        parts: what a sequence is made of.
        counts: of the tokens.
        keys: S.
        chunks: U.
        ranks: N; U where there is one patch.

    Raises:
        ValueError: where the sequence is not made of these parts.
    """
    chunk, rest = divmod(keys, chunks)
    shares = list(_shares(parts, counts, chunk, ranks))
    if sum(share.size for share in shares) != chunk:  # copies may be handed to attention beside the sequence
        parts = tuple(
            part for part in parts if part.cut == "joint" or not _is_copy(part, counts[part.tokens].count, ranks)
        )
        shares = list(_shares(parts, counts, chunk, ranks))
    if rest or sum(share.size for share in shares) != chunk:
        raise ValueError(
            f"an attention layer has {keys} keys on this rank, which are not {chunks} x the shares of its text and "
            "image; otil-xdit does not know this version of xDiT, or of the model"
        )
    copies, cut = [share for share in shares if share.is_copy], [share for share in shares if not share.is_copy]
    if not copies or ranks == chunks:
        kept = _real([_positions(share, chunk, ranks, share.start) for share in shares])
        return KeyPlan(kept=_unless_all(kept, chunk * ranks))
    places = torch.arange(chunk)
    is_cut = torch.cat([torch.full((share.size,), not share.is_copy) for share in shares])
    sent = torch.cat([places[is_cut] + chunk * index for index in range(chunks)])
    own, stride, first = places[~is_cut], sum(share.size for share in cut), int((~is_cut).sum())
    starts = [sum(share.size for share in cut[:index]) for index in range(len(cut))]
    behind = [
        tuple(one + first for one in _positions(share, stride, ranks, start))
        for share, start in zip(cut, starts, strict=True)
    ]
    kept = _real([(torch.arange(first),), *behind])
    return KeyPlan(sent, own, _unless_all(kept, first + stride * ranks))


def _shares(parts: Sequence, counts: Counts, chunk: int, ranks: int) -> Iterator[_Share]:
    """Yield a chunk's share of each part that stands in the sequence."""
    known = sum(_size(part, counts, ranks) for part in parts if part.cut != "joint")
    start = 0
    for part in parts:
        if part.cut == "joint":  # evenly cut, or not in the sequence at all: what the others leave
            tokens = Tokens((chunk - known) * ranks)
            size = chunk - known
        else:
            tokens, size = counts[part.tokens], _size(part, counts, ranks)
        if size > 0:
            yield _Share(start, size, tokens, _is_copy(part, tokens.count, ranks))
        start += size


def _is_copy(part: Part, count: int, ranks: int) -> bool:
    return part.cut == "replicated" or (part.cut == "split" and count % ranks != 0)


def _size(part: Part, counts: Counts, ranks: int) -> int:
    count = counts[part.tokens].count
    return count if _is_copy(part, count, ranks) else -(-count // ranks)


def _positions(share: _Share, stride: int, ranks: int, start: int) -> tuple[torch.Tensor, ...]:
    """Return where a part's real tokens stand among chunks of `stride`, of each sample or of all samples at once."""
    real = share.tokens.real or (torch.arange(share.tokens.count),)
    if share.is_copy:
        return tuple(one.cpu() + start for one in real)
    return tuple(one.cpu() // share.size * stride + start + one.cpu() % share.size for one in real)


def _real(parts: list[tuple[torch.Tensor, ...]]) -> Kept:
    """Join the positions of all parts, sample by sample where they differ."""
    samples = max(map(len, parts))
    joined = tuple(torch.cat([part[index % len(part)] for part in parts]) for index in range(samples))
    return joined[0] if samples == 1 else joined


def _unless_all(kept: Kept, keys: int) -> Kept | None:
    return None if isinstance(kept, torch.Tensor) and len(kept) == keys else kept
