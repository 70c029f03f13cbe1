"""`BlockSelector`: which sub-blocks of a layer a rank sends at a step, from the settings and from what the network is
given.

Shapes: L layers of equal shape, l of them in a run; B batch, S tokens of this rank, C features, K sub-blocks of T
tokens, k sent a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from otil_xdit.method.config import OtilConfig
from otil_xdit.method.grid import TokenLayout, block_table, image_positions, pixel_table
from otil_xdit.method.schedule import Clock
from otil_xdit.method.scores import CHANGE_SCORES, check_score, l2_of_difference
from otil_xdit.method.selection import Selector

MOST_GEOMETRIES = 64
"""Kinds of sequences that are remembered from picture to picture: a U-Net has three or four for each size."""


@dataclass
class _Geometry:
    """Sub-blocks of one kind of sequence, and their picks where all its layers share them."""

    table: torch.Tensor
    image_token: torch.Tensor
    image_tokens: int
    picked: torch.Tensor | None = None
    picked_at: int = -1


class BlockSelector:
    """Scores and picks sub-blocks: for each layer by its keys and values, or once a step by the latent.

    Args:
        config: reads `select`, `block`, `ratio`, `polling`, `max_age` and `seed`.
        clock: the run's.
        rank: this rank's patch; each rank draws random sub-blocks of its own.
        ulysses_degree: ranks that share a patch's heads.
    """

    def __init__(self, config: OtilConfig, clock: Clock, rank: int, ulysses_degree: int) -> None:
        self.layout = TokenLayout(chunks=ulysses_degree)
        self._config, self._clock, self._rank = config, clock, rank
        self._source, _, self._criterion = config.select.partition("-")
        self._geometries: dict[tuple[TokenLayout, int], _Geometry] = {}
        self._selectors: dict[object, Selector] = {}
        self._latent: torch.Tensor | None = None
        self._previous_latent: torch.Tensor | None = None
        self._latent_at = -1
        self._generator = torch.Generator()

    def begin(self) -> None:
        """Start a generation: it picks as any other with the same input does."""
        self._latent = self._previous_latent = None
        self._latent_at = -1
        self._generator.manual_seed(self._config.seed + self._rank)
        if len(self._geometries) > MOST_GEOMETRIES:
            self._forget_geometries()
        for selector in self._selectors.values():
            selector.reset()
        for geometry in self._geometries.values():
            geometry.picked, geometry.picked_at = None, -1

    def free(self) -> None:
        """Forget every layer."""
        self._geometries.clear()
        self._selectors.clear()
        self._latent = self._previous_latent = None

    def _forget_geometries(self) -> None:
        """Forget what follows from the sizes of pictures; it is found again when one of them comes again."""
        self._geometries.clear()
        self._selectors = {key: found for key, found in self._selectors.items() if isinstance(key, str)}

    def forget(self, name: str) -> None:
        """Forget one layer, whose sub-blocks are others now."""
        self._selectors.pop(name, None)

    def observe(self, latent: torch.Tensor | None, layout: TokenLayout) -> None:
        """See `otil_xdit.exchange.communicator.OtilCommunicator.observe`."""
        if self._source == "kv":
            check_score(self._criterion, self._side(layout))
        self.layout = layout
        if latent is not None and self._source == "latent" and self._latent_at != self._clock.step:
            self._previous_latent, self._latent = self._latent, latent.detach().clone()
            self._latent_at = self._clock.step

    def table(self, tokens: int, device: torch.device) -> torch.Tensor:
        """Tokens of each sub-block in a sequence of `tokens` tokens of the present layout, int64 [K, T]."""
        return self._geometry(tokens, device).table

    def shared(self, table: torch.Tensor, tokens: int) -> torch.Tensor | None:
        """The sub-blocks that this rank sends of all layers of the present layout at this step; None where they differ.

        To be asked when a layer is called: a message may leave only after the next layer's layout has been observed.

        Args:
            table: the layers', as `table` gave it.
            tokens: S.

        Returns:
            int64 [1, k], the same for all calls of a step.
        """
        if self._source == "kv":
            return None
        geometry = self._geometry(tokens, table.device)
        if geometry.picked is None or geometry.picked_at != self._clock.step:
            scores = self._random_scores(geometry) if self._source == "random" else self._latent_scores(geometry)
            geometry.picked = self._selector((self.layout, tokens), 1, table).pick(scores[None])
            geometry.picked_at = self._clock.step
        return geometry.picked

    def pick(
        self,
        layers: tuple[str, int],
        table: torch.Tensor,
        fresh: torch.Tensor,
        reference: torch.Tensor,
        difference: torch.Tensor | None,
        run: slice,
    ) -> torch.Tensor:
        """The sub-blocks that this rank sends of some layers now, by their keys and values.

        Args:
            layers: a name for all L layers, and L.
            table: theirs, as `table` gave it.
            fresh: this rank's keys and values, [l, 2, B, S, C].
            reference: what they have changed from: the step before, or what the others predict.
            difference: the one less the other, where it is known.
            run: which of the layers.

        Returns:
            int64 [l, k].
        """
        if self._criterion == "l2" and difference is not None:
            scores = l2_of_difference(difference, table)
        else:
            score = CHANGE_SCORES[self._criterion]
            scores = torch.stack([score(new, old, table) for new, old in zip(fresh, reference, strict=True)])
        return self._selector(*layers, table).pick(scores, run)

    def _geometry(self, tokens: int, device: torch.device) -> _Geometry:
        found = self._geometries.get((self.layout, tokens))
        if found is None:
            segments = self.layout.segments(tokens)
            table = block_table(segments, self._side(self.layout))
            image_token = image_positions(segments)
            found = _Geometry(table.to(device), image_token.to(device), int(image_token.max()) + 1)
            self._geometries[self.layout, tokens] = found
        return found

    def _side(self, layout: TokenLayout) -> int:
        """Tokens a side of a sub-block."""
        return max(1, self._config.block_size // layout.pixels)

    def _selector(self, key: object, layers: int, table: torch.Tensor) -> Selector:
        if key not in self._selectors:
            config, blocks = self._config, table.shape[0]
            self._selectors[key] = Selector(blocks, config.ratio, config.polling, config.max_age, table.device, layers)
        return self._selectors[key]

    def _random_scores(self, geometry: _Geometry) -> torch.Tensor:
        return torch.rand(geometry.table.shape[0], generator=self._generator).to(geometry.table.device)

    def _latent_scores(self, geometry: _Geometry) -> torch.Tensor:
        """Change of the latent under each sub-block; text has no latent and is sent by polling alone."""
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
        """The latent's pixels under the layout's tokens in row order: [B, pixels, C], zeros where padded."""
        if latent is None or self.layout.rows == 0:
            return None
        side = self.layout.pixels
        rows, cols = self.layout.rows * side - latent.shape[2], self.layout.cols * side - latent.shape[3]
        padded = functional.pad(latent, (0, max(cols, 0), 0, max(rows, 0)))
        return padded.flatten(2).transpose(1, 2)
