"""Which keys of an attention call are real, which are sent, and which stay here.

A rank's sequence is made of as many chunks as the Ulysses degree says, one behind the other, and a chunk of the shares
of the sequence's parts (`otil_xdit.catalog.architectures`). Shares may be padded, and text that every rank has a copy
of is neither sent nor attended to twice. Patches may have unequal shares (`otil_xdit.networks.dit.token_cut`): what
they send is then filled up to the longest.

Shapes: S keys of this rank, N patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch

from otil_xdit.catalog.architectures import Part, Sequence
from otil_xdit.method.grid import kept_tokens
from otil_xdit.networks.dit.token_counts import Counts, Tokens
from otil_xdit.networks.dit.token_cut import TokenCut

Kept = torch.Tensor | tuple[torch.Tensor, ...]
"""int64, positions of the keys that may be attended to, or those of each sample."""


@dataclass(frozen=True)
class KeyPlan:
    """What to do with the keys of one attention call.

    Attributes:
        sent: int64, positions in this rank's sequence of what other patches get; None for all.
        own: int64, positions of what stays here and stands before what is gathered; None for nothing.
        kept: positions of the real keys in `own` and the gathered ones; None for all.
        longest: keys of the patch that sends most, which others fill theirs up to; 0 where all send equally many.
        unfilled: int64, positions of what was sent among what is gathered, without what filled it up; None for all.
    """

    sent: torch.Tensor | None = None
    own: torch.Tensor | None = None
    kept: Kept | None = None
    longest: int = 0
    unfilled: torch.Tensor | None = None

    def to(self, device: torch.device) -> KeyPlan:
        """Return the plan with its positions on `device`."""
        kept = self.kept
        if isinstance(kept, tuple):
            kept = tuple(one.to(device) for one in kept)
        elif kept is not None:
            kept = kept.to(device)
        sent, own, unfilled = (None if one is None else one.to(device) for one in (self.sent, self.own, self.unfilled))
        return KeyPlan(sent, own, kept, self.longest, unfilled)


@dataclass(frozen=True)
class _Share:
    """The ranks' shares of a part, of `sizes` tokens, of `tokens` in all."""

    sizes: tuple[int, ...]
    tokens: Tokens
    is_copy: bool


def plan_keys(parts: Sequence, counts: Counts, keys: int, cut: TokenCut, patch: int, joint: int = 0) -> KeyPlan:
    """Return what to do with the keys of an attention call.

    Args:
        parts: what a sequence is made of.
        counts: of the tokens.
        keys: S.
        cut: of the tokens.
        patch: this rank's.
        joint: tokens that stand in the sequence for a "joint" part; needed where shares are unequal.

    Raises:
        ValueError: where the sequence is not made of these parts.
    """
    place = patch * cut.chunks
    chunk, rest = divmod(keys, cut.chunks)
    shares = list(_shares(parts, counts, chunk, cut, place, joint))
    if _total(shares, place) != chunk:  # copies may be handed to attention beside the sequence
        parts = tuple(
            part for part in parts if part.cut == "joint" or not _is_copy(part, counts[part.tokens].count, cut.ranks)
        )
        shares = list(_shares(parts, counts, chunk, cut, place, joint))
    if rest or _total(shares, place) != chunk:
        raise ValueError(
            f"an attention layer has {keys} keys on this rank, which are not {cut.chunks} x the shares of its text and "
            "image; otil-xdit does not know this version of xDiT, or of the model"
        )
    split = [share for share in shares if not share.is_copy]
    if len(split) == len(shares) or cut.ranks == cut.chunks:
        kept = _real([_positions(*one) for one in zip(shares, _starts(shares, 0), strict=True)])
        return KeyPlan(None, None, _unless_all(kept, shares, 0), *_filling(shares, cut))
    places = torch.arange(chunk)
    is_cut = torch.cat([torch.full((share.sizes[place],), not share.is_copy) for share in shares])
    sent = torch.cat([places[is_cut] + chunk * index for index in range(cut.chunks)])
    own = places[~is_cut]
    behind = [_positions(*one) for one in zip(split, _starts(split, len(own)), strict=True)]
    kept = _real([(torch.arange(len(own)),), *behind])
    return KeyPlan(sent, own, _unless_all(kept, split, len(own)), *_filling(split, cut))


def _shares(parts: Sequence, counts: Counts, chunk: int, cut: TokenCut, place: int, joint: int) -> Iterator[_Share]:
    """Yield the shares of each part that stands in the sequence."""
    known = sum(_sizes(part, counts, cut)[place] for part in parts if part.cut != "joint")
    for part in parts:
        if part.cut != "joint":
            tokens = counts[part.tokens]
            yield _Share(_sizes(part, counts, cut), tokens, _is_copy(part, tokens.count, cut.ranks))
        elif chunk > known:  # cut as the others are, or not in the sequence at all: what the others leave
            count = joint if cut.shares else (chunk - known) * cut.ranks
            yield _Share(cut.sizes(count), Tokens(count), False)


def _is_copy(part: Part, count: int, ranks: int) -> bool:
    return part.cut == "replicated" or (part.cut == "split" and count % ranks != 0)


def _sizes(part: Part, counts: Counts, cut: TokenCut) -> tuple[int, ...]:
    count = counts[part.tokens].count
    return (count,) * cut.ranks if _is_copy(part, count, cut.ranks) else cut.sizes(count)


def _total(shares: list[_Share], rank: int) -> int:
    """Return the length of a rank's chunk."""
    return sum(share.sizes[rank] for share in shares)


def _starts(shares: list[_Share], first: int) -> list[list[int]]:
    """Return where each rank's part of each share stands among everybody's chunks, which follow `first` other keys."""
    ranks = len(shares[0].sizes) if shares else 0
    ends = list(accumulate((share.sizes[rank] for rank in range(ranks) for share in shares), initial=first))
    return [ends[index :: len(shares)][:ranks] for index in range(len(shares))]


def _positions(share: _Share, starts: list[int]) -> tuple[torch.Tensor, ...]:
    """Return where a part's real tokens stand, of each sample or of all samples at once.

    Args:
        share: of all ranks.
        starts: of each rank's part of it.
    """
    real = tuple(one.cpu() for one in share.tokens.real or (torch.arange(share.tokens.count),))
    if share.is_copy:
        return tuple(one + starts[0] for one in real)
    ends = list(accumulate(share.sizes))
    moved = torch.tensor(starts) - torch.tensor([0, *ends[:-1]])
    bounds = torch.tensor(ends[:-1])
    return tuple(one + moved[torch.bucketize(one, bounds, right=True)] for one in real)


def _real(parts: list[tuple[torch.Tensor, ...]]) -> Kept:
    """Join the positions of all parts, sample by sample where they differ."""
    samples = max(map(len, parts))
    joined = tuple(torch.cat([part[index % len(part)] for part in parts]) for index in range(samples))
    return joined[0] if samples == 1 else joined


def _unless_all(kept: Kept, shares: list[_Share], first: int) -> Kept | None:
    keys = first + sum(sum(share.sizes) for share in shares)
    return None if isinstance(kept, torch.Tensor) and len(kept) == keys else kept


def _filling(shares: list[_Share], cut: TokenCut) -> tuple[int, torch.Tensor | None]:
    """Return the keys of the patch that sends most, and where all patches' keys stand once others fill theirs up."""
    lengths = [cut.chunks * _total(shares, patch * cut.chunks) for patch in range(cut.ranks // cut.chunks)]
    longest = max(lengths)
    return (0, None) if min(lengths) == longest else (longest, kept_tokens(lengths, longest))
