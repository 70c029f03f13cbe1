"""Sub-blocks of whole layers: which are selected by the latent, at random, and by keys and values, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from otil_xdit.method.config import OtilConfig
from otil_xdit.method.grid import TokenLayout
from otil_xdit.method.schedule import Clock
from otil_xdit.method.scores import l2_change, l2_of_difference
from otil_xdit.method.selection import BlockSelector

CPU = torch.device("cpu")
ROWS, COLS, TEXT = 4, 6, 4
IMAGE, JOINED = TokenLayout(ROWS, COLS, pixels=2), TokenLayout(ROWS, COLS, pixels=2, text="front")


def make_selector(rank: int = 0, **settings: Any) -> tuple[BlockSelector, Clock]:
    usual: dict[str, Any] = {"select": "latent-l2", "ratio": 1 / 6, "polling": 0.0, "max_age": 0, "block_size": 4}
    clock = Clock()
    selector = BlockSelector(OtilConfig(**{**usual, **settings}), clock, rank, 1)
    selector.begin()
    return selector, clock


def changed_at(row: int, col: int) -> torch.Tensor:
    """A latent of 2 x 2 pixels a token, [1, 3, 8, 12], which differs from zeros at one token."""
    latent = torch.zeros(1, 3, 2 * ROWS, 2 * COLS)
    latent[..., 2 * row : 2 * row + 2, 2 * col : 2 * col + 2] = 1.0
    return latent


def selected_tokens(selector: BlockSelector, layout: TokenLayout, tokens: int) -> set[int]:
    table = selector.table(tokens, CPU)
    found = selector.select_shared(table, tokens)
    assert found is not None
    return set(table[found[0]].flatten().tolist())


@pytest.mark.parametrize(("layout", "text"), [(IMAGE, 0), (JOINED, TEXT)])
def test_what_changed_in_the_latent_is_selected_at_every_step_anew(layout: TokenLayout, text: int) -> None:
    """Sub-blocks of 4 latent pixels a side are 2 tokens a side; text tokens in front have no latent."""
    selector, clock = make_selector()
    selector.observe(torch.zeros(1, 3, 2 * ROWS, 2 * COLS), layout)
    clock.tick()
    before = torch.zeros(1, 3, 2 * ROWS, 2 * COLS)
    for row, col in ((2, 5), (0, 0), (3, 2)):
        latent = before + changed_at(row, col)
        selector.observe(latent, layout)
        corner = (row // 2 * 2, col // 2 * 2)
        expected = {text + (corner[0] + down) * COLS + corner[1] + right for down in (0, 1) for right in (0, 1)}
        assert selected_tokens(selector, layout, ROWS * COLS + text) == expected
        before = latent
        clock.tick()


def test_every_rank_draws_its_own_and_the_same_in_every_generation() -> None:
    def generation(selector: BlockSelector, clock: Clock) -> list[list[int]]:
        clock.reset()
        selector.begin()
        found = []
        for _ in range(4):
            selector.observe(None, IMAGE)
            found.append(sorted(selected_tokens(selector, IMAGE, ROWS * COLS)))
            clock.tick()
        return found

    ranks = [make_selector(rank, select="random", ratio=1 / 2) for rank in range(2)]
    first, second = (generation(*rank) for rank in ranks)
    assert first != second
    assert len({tuple(step) for step in first}) > 1, "drawn anew at every step"
    assert first == generation(*ranks[0])


def test_distances_of_several_layers_are_those_of_each() -> None:
    fresh, old = torch.randn(2, 3, 2, 1, 12, 5, generator=torch.Generator().manual_seed(0))
    table = torch.arange(12).view(4, 3)
    alone = torch.stack([l2_change(new, before, table) for new, before in zip(fresh, old, strict=True)])
    torch.testing.assert_close(l2_of_difference(fresh - old, table), alone)
