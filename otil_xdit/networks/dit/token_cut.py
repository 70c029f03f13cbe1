"""`TokenCut`: how many tokens of a sequence each rank has."""

from __future__ import annotations

from dataclasses import dataclass

from otil_xdit.method.grid import split_rows


@dataclass(frozen=True)
class TokenCut:
    """Who has which tokens of a sequence.

    Attributes:
        ranks: that share the tokens, patch x Ulysses, in the order of the tokens.
        chunks: of these ranks that share a patch; the Ulysses degree.
        shares: of the tokens, for each patch, in any unit; empty for equal ones.
    """

    ranks: int
    chunks: int = 1
    shares: tuple[int, ...] = ()

    @property
    def rank_shares(self) -> tuple[int, ...]:
        """Return the shares of the ranks; empty for equal ones."""
        return tuple(share for share in self.shares for _ in range(self.chunks))

    def padded(self, tokens: int) -> int:
        """Return how many tokens there are once they are filled up until the ranks divide them."""
        return -(-tokens // self.ranks) * self.ranks

    def sizes(self, tokens: int) -> tuple[int, ...]:
        """Return how many of the filled up tokens each rank has; ranks of one patch have equally many."""
        padded = self.padded(tokens)
        if not self.shares or padded == 0:
            return (padded // self.ranks,) * self.ranks
        by_patch = split_rows(padded // self.chunks, self.ranks // self.chunks, self.shares)
        return tuple(size for size in by_patch for _ in range(self.chunks))
