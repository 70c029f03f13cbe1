"""Which sub-blocks of a layer a rank sends at a step: by how much they changed (scores.py), some of them in turn.

Shapes: L layers of equal shape, l of them in a run; B batch, S tokens of this rank, C features, K sub-blocks of T
tokens, k sent a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from otil_xdit.method.config import OtilConfig
from otil_xdit.method.grid import TokenLayout, block_table, image_positions, pixel_table
from otil_xdit.method.schedule import Clock
from otil_xdit.method.scores import CHANGE_SCORES, check_score, l2_of_difference

MOST_GEOMETRIES = 64
"""Kinds of sequences that are remembered from image to image: a U-Net has three or four for each size."""


def blocks_to_send(total: int, ratio: float) -> int:
    """Return k of `total` sub-blocks at `ratio`: never more than the ratio allows, but at least one."""
    return max(1, math.floor(total * ratio + 1e-9))


class TopKSelector:
    """Select k of K sub-blocks each step: some because they have waited longest (polling), the rest by score.

    With p polled sub-blocks none stays unsent for more than ceil(K / p) steps, whatever the scores are: the number of
    sub-blocks that have waited longer than a given one shrinks by p a step until that one is sent.

    Args:
        total: K.
        ratio: k / K.
        polling: share of the k that is polled.
        max_age: bound on the steps that a sub-block stays unsent. As many are polled as it takes, ceil(K / p) <=
            max_age, as far as k allows. 0 for no bound.
        device: of the scores.
        layers: L; each has ages of its own.
    """

    def __init__(
        self, total: int, ratio: float, polling: float, max_age: int, device: torch.device, layers: int = 1
    ) -> None:
        self.total = total
        self.count = blocks_to_send(total, ratio)
        bounded = math.ceil(total / max_age) if max_age else 0
        self.polled = min(self.count, max(math.ceil(self.count * polling - 1e-9), bounded))
        # Ages times K, and a number below K for each, so that no two are equal and the order is the same everywhere.
        self._order = torch.arange(total - 1, -1, -1, device=device)
        self._age = torch.zeros(layers, total, dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Forget the ages, so that equal scores select equal sub-blocks in every generation."""
        self._age.zero_()

    def select(self, scores: torch.Tensor, layers: slice = slice(None)) -> torch.Tensor:
        """Return the indices of the sub-blocks to send now.

        Args:
            scores: [l, K]; the sub-blocks with the largest scores are taken, after the polled ones.
            layers: the layers that the scores are of.

        Returns:
            int64 [l, k] on the scores' device, without duplicates; fixed k, no host synchronisation.
        """
        age = self._age[layers]
        assert scores.shape == age.shape, f"scores {tuple(scores.shape)} for {tuple(age.shape)} sub-blocks"
        if not self.polled:  # ages do not matter
            return scores.topk(self.count).indices
        oldest = (age * self.total + self._order).topk(self.polled).indices
        best = scores.scatter(1, oldest, -math.inf).topk(self.count - self.polled).indices
        selected = torch.cat([oldest, best], dim=1)
        age.add_(1).scatter_(1, selected, 0)
        return selected


@dataclass
class _Geometry:
    """Sub-blocks of one kind of sequence, and those selected at a step where all its layers share them."""

    table: torch.Tensor
    image_token: torch.Tensor
    image_tokens: int
    selected: torch.Tensor | None = None
    selected_at: int = -1


class BlockSelector:
    """Score and select sub-blocks: for each layer by its keys and values, or once a step by the latent.

    Args:
        config: reads `select`, `block_size`, `ratio`, `polling`, `max_age` and `seed`.
        clock: of the generation.
        rank: this rank's patch; each rank draws random sub-blocks of its own.
        ulysses_degree: ranks that share a patch's attention heads.
    """

    def __init__(self, config: OtilConfig, clock: Clock, rank: int, ulysses_degree: int) -> None:
        self.layout = TokenLayout(chunks=ulysses_degree)
        self._config, self._clock, self._rank = config, clock, rank
        self._source, _, self._criterion = config.select.partition("-")
        self._geometries: dict[tuple[TokenLayout, int], _Geometry] = {}
        self._selectors: dict[object, TopKSelector] = {}
        self._latent: torch.Tensor | None = None
        self._previous_latent: torch.Tensor | None = None
        self._latent_at = -1
        self._generator = torch.Generator()

    @property
    def remembered(self) -> tuple[int, int]:
        """Numbers of kinds of sequences, and of layers or kinds of sequences with ages, of which there is a state."""
        return len(self._geometries), len(self._selectors)

    def begin(self) -> None:
        """Start a generation; equal input selects equal sub-blocks in every one."""
        self._latent = self._previous_latent = None
        self._latent_at = -1
        self._generator.manual_seed(self._config.seed + self._rank)
        if len(self._geometries) > MOST_GEOMETRIES:
            self._discard_geometries()
        for selector in self._selectors.values():
            selector.reset()
        for geometry in self._geometries.values():
            geometry.selected, geometry.selected_at = None, -1

    def clear(self) -> None:
        """Discard the state of every layer."""
        self._geometries.clear()
        self._selectors.clear()
        self._latent = self._previous_latent = None

    def _discard_geometries(self) -> None:
        """Discard what follows from images' sizes; it is computed again when a size comes back."""
        self._geometries.clear()
        self._selectors = {key: found for key, found in self._selectors.items() if isinstance(key, str)}

    def discard(self, name: str) -> None:
        """Discard the state of one layer, whose sub-blocks have changed."""
        self._selectors.pop(name, None)

    def observe(self, latent: torch.Tensor | None, layout: TokenLayout) -> None:
        """Take note of what a network is about to be called with.

        Args:
            latent: this rank's part, [B, C, rows, cols]; None where it is not known.
            layout: of the sequences of the attention layers that follow.

        Raises:
            ValueError: where the change score does not fit sub-blocks of this layout.
        """
        if self._source == "kv":
            check_score(self._criterion, self._side(layout))
        self.layout = layout
        if latent is not None and self._source == "latent" and self._latent_at != self._clock.step:
            self._previous_latent, self._latent = self._latent, latent.detach().clone()
            self._latent_at = self._clock.step

    def table(self, tokens: int, device: torch.device) -> torch.Tensor:
        """Return the tokens of each sub-block in a sequence of `tokens` tokens of the present layout, int64 [K, T]."""
        return self._geometry(tokens, device).table

    def select_shared(self, table: torch.Tensor, tokens: int) -> torch.Tensor | None:
        """Select the sub-blocks that this rank sends at this step of all layers of the present layout.

        Call it when a layer is called, not when its message leaves: by then the next layer's layout may have been
        observed.

        Args:
            table: the layers' sub-blocks, as `table` returned them.
            tokens: S.

        Returns:
            int64 [1, k], the same for all calls of a step; None where layers differ, see `scores`.
        """
        if self._source == "kv":
            return None
        geometry = self._geometry(tokens, table.device)
        if geometry.selected is None or geometry.selected_at != self._clock.step:
            scores = self._random_scores(geometry) if self._source == "random" else self._latent_scores(geometry)
            geometry.selected = self._selector((self.layout, tokens), 1, table).select(scores[None])
            geometry.selected_at = self._clock.step
        return geometry.selected

    def scores(
        self, table: torch.Tensor, fresh: torch.Tensor, reference: torch.Tensor, difference: torch.Tensor | None
    ) -> torch.Tensor:
        """Score the sub-blocks of some layers by their keys and values.

        Args:
            table: the layers' sub-blocks, as `table` returned them.
            fresh: this rank's keys and values, [l, 2, B, S, C].
            reference: what they are compared with: the step before, or what the other ranks predict; same shape.
            difference: fresh - reference, float32, where it is known.

        Returns:
            float32 [l, K].
        """
        if self._criterion == "l2" and difference is not None:
            return l2_of_difference(difference, table)
        score = CHANGE_SCORES[self._criterion]
        return torch.stack([score(new, old, table) for new, old in zip(fresh, reference, strict=True)])

    @property
    def compares_by_l2(self) -> bool:
        """Tell whether sub-blocks are selected by the squared distance of a layer's keys and values."""
        return self._source == "kv" and self._criterion == "l2"

    @property
    def takes_largest(self) -> bool:
        """Tell whether none is selected in turn, so that nothing of earlier steps matters."""
        return not self._config.polling and not self._config.max_age

    def select_scored(
        self, layers: tuple[str, int], table: torch.Tensor, scores: torch.Tensor, run: slice
    ) -> torch.Tensor:
        """Select the sub-blocks that this rank sends now of some layers.

        Args:
            layers: a name for all L layers, and L.
            table: the layers' sub-blocks, as `table` returned them.
            scores: float32 [l, K].
            run: which of the layers.

        Returns:
            int64 [l, k].
        """
        return self._selector(*layers, table).select(scores, run)

    def _geometry(self, tokens: int, device: torch.device) -> _Geometry:
        found = self._geometries.get((self.layout, tokens))
        if found is None:
            segments = self.layout.segments(tokens)
            table = block_table(segments, self._side(self.layout))
            image_token = image_positions(segments)
            image_tokens = sum(segment.tokens for segment in segments if segment.is_image)
            found = _Geometry(table.to(device), image_token.to(device), image_tokens)
            self._geometries[self.layout, tokens] = found
        return found

    def _side(self, layout: TokenLayout) -> int:
        """Return the tokens a side of a sub-block."""
        return max(1, self._config.block_size // layout.pixels)

    def _selector(self, key: object, layers: int, table: torch.Tensor) -> TopKSelector:
        if key not in self._selectors:
            config, blocks = self._config, table.shape[0]
            self._selectors[key] = TopKSelector(
                blocks, config.ratio, config.polling, config.max_age, table.device, layers
            )
        return self._selectors[key]

    def _random_scores(self, geometry: _Geometry) -> torch.Tensor:
        return torch.rand(geometry.table.shape[0], generator=self._generator).to(geometry.table.device)

    def _latent_scores(self, geometry: _Geometry) -> torch.Tensor:
        """Score the latent under each sub-block, float32 [K]; text has no latent and is sent by polling alone."""
        positions = geometry.image_token[geometry.table]
        latent, previous = (self._pixels_of(seen) for seen in (self._latent, self._previous_latent))
        side = self.layout.pixels
        if latent is None or previous is None or latent.shape[-2] != geometry.image_tokens * side**2:
            raise ValueError(
                f"otil_select {self._config.select} needs a latent whose sub-blocks can be told apart, which this "
                "model or this Ulysses degree does not give; choose kv-cosine or kv-l2"
            )
        pixels = pixel_table(positions.clamp_min(0), self.layout.cols, side)
        scores = CHANGE_SCORES[self._criterion](latent, previous, pixels)
        return scores.masked_fill(positions[:, 0] < 0, torch.finfo(scores.dtype).min)

    def _pixels_of(self, latent: torch.Tensor | None) -> torch.Tensor | None:
        """Return the latent's pixels under the layout's tokens in row order: [B, pixels, C], zeros where padded."""
        if latent is None or self.layout.rows == 0:
            return None
        side = self.layout.pixels
        rows, cols = self.layout.rows * side - latent.shape[2], self.layout.cols * side - latent.shape[3]
        padded = functional.pad(latent, (0, max(cols, 0), 0, max(rows, 0)))
        return padded.flatten(2).transpose(1, 2)
