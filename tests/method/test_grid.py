"""Geometry: every row and every token exactly where it belongs, for any size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otil_xdit.method.grid import (
    LevelGrid,
    Segment,
    TokenLayout,
    block_table,
    image_positions,
    kept_tokens,
    pixel_table,
    split_rows,
)

sizes = st.integers(1, 40)


def test_rows_by_shares() -> None:
    assert split_rows(32, 2, (3, 2)) == (19, 13) and split_rows(32, 2, (2, 3)) == (13, 19)
    assert split_rows(4, 3, (100, 1, 1)) == (2, 1, 1), "each has a row"
    assert split_rows(9, 3, (1, 1, 1)) == split_rows(9, 3) and sum(split_rows(7, 4, (3, 3, 2, 9))) == 7
    assert LevelGrid.build(24, 24, 3, 2, (2, 1)).rows == ((16, 8), (8, 4), (4, 2))


@given(rows=st.integers(1, 300), parts=st.integers(1, 16))
def test_patches_cover_every_row_once(rows: int, parts: int) -> None:
    if rows < parts:
        with pytest.raises(ValueError, match=f"{rows} rows"):
            split_rows(rows, parts)
        return
    heights = split_rows(rows, parts)
    assert sum(heights) == rows and len(heights) == parts
    assert max(heights) - min(heights) <= 1 and min(heights) >= 1


@given(height=st.integers(1, 300), width=st.integers(1, 40), levels=st.integers(1, 5), ranks=st.integers(1, 8))
def test_levels_are_cut_in_the_same_places(height: int, width: int, levels: int, ranks: int) -> None:
    lowest = height
    for _ in range(levels - 1):
        lowest = (lowest + 1) // 2
    if lowest < ranks:
        with pytest.raises(ValueError, match=f"{height} rows of the latent are {lowest}") as refused:
            LevelGrid.build(height, width, levels, ranks)
        least = int(str(refused.value).split("at least ")[1].split()[0])
        assert LevelGrid.build(least, width, levels, ranks) and least > height
        return
    grid = LevelGrid.build(height, width, levels, ranks)
    for level, rows in enumerate(grid.rows):
        assert sum(rows) == grid.heights[level] and len(rows) == ranks and min(rows) >= 1
        assert max(rows) - min(rows) <= 2 ** (levels - level), "more unequal than a row of the smallest map"
        covered = [row for rank in range(ranks) for row in range(height)[: sum(rows)][grid.slice_of(level, rank)]]
        assert covered == list(range(grid.heights[level]))
    for finer, coarser in zip(range(levels - 1), range(1, levels), strict=True):
        for rank in range(1, ranks):
            assert grid.slice_of(finer, rank).start == 2 * grid.slice_of(coarser, rank).start


def test_a_map_is_found_by_its_size() -> None:
    grid = LevelGrid.build(33, 20, 3, 2)
    assert [grid.level_of(*size) for size in ((33, 20), (17, 10), (9, 5))] == [0, 1, 2]
    with pytest.raises(ValueError, match="16 x 10 belongs to no level"):
        grid.level_of(16, 10)


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_padding_is_left_out(counts: list[int]) -> None:
    chunk = max(counts)
    padded = [(index, token) if token < count else None for index, count in enumerate(counts) for token in range(chunk)]
    kept = [padded[position] for position in kept_tokens(counts, chunk).tolist()]
    assert kept == [entry for entry in padded if entry is not None]


@settings(deadline=None)
@given(rows=sizes, cols=sizes, text=st.integers(0, 50), side=st.integers(1, 9))
def test_sub_blocks_cover_every_token_with_fixed_shape(rows: int, cols: int, text: int, side: int) -> None:
    segments = [Segment(rows, cols)] + ([Segment(1, text, is_image=False)] if text else [])
    table = block_table(segments, side)
    tokens = rows * cols + text
    assert set(table.flatten().tolist()) == set(range(tokens))
    assert all(len(set(block)) == len(block) for block in table.tolist()), "a sub-block holds a token twice"
    of_text = table >= rows * cols
    assert (of_text.all(dim=1) | (~of_text).all(dim=1)).all(), "a sub-block mixes image and text"


def test_squares_are_squares_of_the_image() -> None:
    table = block_table([Segment(4, 6)], 2)
    assert table.shape == (6, 4)
    assert table[0].tolist() == [0, 1, 6, 7] and table[-1].tolist() == [16, 17, 22, 23]


def test_last_sub_block_moves_back_where_the_size_does_not_divide() -> None:
    assert block_table([Segment(3, 3)], 2)[:, 0].tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("segments, side", [([], 2), ([Segment(0, 4)], 2), ([Segment(4, 4)], 0)])
def test_impossible_blocks_are_refused(segments: list[Segment], side: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        block_table(segments, side)


def test_layout_puts_text_where_the_model_does_in_every_ulysses_chunk() -> None:
    rear = TokenLayout(rows=2, cols=3, text="rear", chunks=2).segments(20)
    assert [(segment.tokens, segment.is_image) for segment in rear] == [(6, True), (4, False)] * 2
    front = TokenLayout(rows=2, cols=3, text="front").segments(7)
    assert [segment.is_image for segment in front] == [False, True]
    assert image_positions(rear).tolist() == [*range(6), *[-1] * 4, *range(6, 12), *[-1] * 4]


def test_unknown_order_becomes_one_run() -> None:
    assert TokenLayout(chunks=2).segments(20) == [Segment(1, 20, is_image=False)]
    assert TokenLayout(rows=2, cols=3, text="none").segments(7) == [Segment(1, 7, is_image=False)]
    assert torch.equal(image_positions([Segment(1, 3, is_image=False)]), torch.full((3,), -1))


def test_pixels_of_a_sub_block_are_a_square_of_the_latent() -> None:
    rows, cols, side, block = 4, 6, 2, 2
    table = block_table([Segment(rows, cols)], block)
    latent = torch.arange(rows * side * cols * side).view(rows * side, cols * side)
    pixels = latent.flatten()[pixel_table(table, cols, side)]
    corners = [(top, left) for top in range(0, rows * side, 4) for left in range(0, cols * side, 4)]
    assert [square.view(4, 4).tolist() for square in pixels] == [
        latent[top : top + 4, left : left + 4].tolist() for top, left in corners
    ]
