"""Change scores against plain slow loops, and what must hold for any of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from otil_xdit.method.grid import Segment, block_table
from otil_xdit.method.scores import CHANGE_SCORES, MI_BINS, check_score

SIDE = 8
GRID = block_table([Segment(20, 16)], SIDE)
"""Six sub-blocks of 8 x 8; the last row of them overlaps the one above."""


def steps(*leading: int, seed: int = 0, amount: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """A map of 20 x 16 tokens with an offset and its noisy earlier self, [*leading, 320, 3]."""
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(*leading, 320, 3, generator=generator) + 0.7
    return fresh, fresh + amount * torch.randn(fresh.shape, generator=generator)


def channels(features: torch.Tensor, tokens: torch.Tensor) -> np.ndarray:
    """The values of one sub-block by channel, float64 [channels, T]."""
    return features[..., tokens, :].double().movedim(-1, -2).flatten(0, -2).numpy()


def cosine_by_hand(fresh: torch.Tensor, previous: torch.Tensor, tokens: torch.Tensor) -> float:
    new, old = channels(fresh, tokens).ravel(), channels(previous, tokens).ravel()
    return 1 - float(new @ old / np.sqrt((new @ new) * (old @ old)))


def l2_by_hand(fresh: torch.Tensor, previous: torch.Tensor, tokens: torch.Tensor) -> float:
    return float(((channels(fresh, tokens) - channels(previous, tokens)) ** 2).sum())


def ssim_by_hand(fresh: torch.Tensor, previous: torch.Tensor, tokens: torch.Tensor) -> float:
    everywhere = torch.arange(fresh.shape[-2])
    found = []
    for index, (x, y) in enumerate(zip(channels(fresh, tokens), channels(previous, tokens), strict=True)):
        whole = np.concatenate([channels(fresh, everywhere)[index], channels(previous, everywhere)[index]])
        c1, c2 = (0.01 * np.ptp(whole)) ** 2, (0.03 * np.ptp(whole)) ** 2
        covariance = ((x - x.mean()) * (y - y.mean())).mean()
        above = (2 * x.mean() * y.mean() + c1) * (2 * covariance + c2)
        found.append(above / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (x.var() + y.var() + c2)))
    return 1 - float(np.mean(found))


def mi_by_hand(fresh: torch.Tensor, previous: torch.Tensor, tokens: torch.Tensor) -> float:
    counts, _, _ = np.histogram2d(channels(fresh, tokens).ravel(), channels(previous, tokens).ravel(), bins=MI_BINS)
    joint = counts / counts.sum()
    total = 0.0
    for i in range(MI_BINS):
        for j in range(MI_BINS):
            if joint[i, j] > 0:
                total += joint[i, j] * math.log(joint[i, j] / (joint[i].sum() * joint[:, j].sum()))
    return -total


def dhash_by_hand(fresh: torch.Tensor, previous: torch.Tensor, tokens: torch.Tensor) -> float:
    side = math.isqrt(len(tokens))
    width = side if side * side == len(tokens) else len(tokens)
    differ = total = 0
    for new, old in zip(channels(fresh, tokens), channels(previous, tokens), strict=True):
        for place in range(len(tokens)):
            if place % width:
                differ += (new[place] > new[place - 1]) != (old[place] > old[place - 1])
                total += 1
    return differ / total


BY_HAND = {
    "cosine": cosine_by_hand,
    "l2": l2_by_hand,
    "ssim": ssim_by_hand,
    "mi": mi_by_hand,
    "dhash": dhash_by_hand,
}

every_score = pytest.mark.parametrize("name", CHANGE_SCORES)


@every_score
@pytest.mark.parametrize("leading", [(), (2,), (2, 2, 3)])
def test_scores_are_what_loops_over_sub_blocks_give(name: str, leading: tuple[int, ...]) -> None:
    fresh, previous = steps(*leading)
    scores = CHANGE_SCORES[name](fresh, previous, GRID)
    assert scores.shape == (6,) and scores.dtype == torch.float32
    expected = [BY_HAND[name](fresh, previous, tokens) for tokens in GRID]
    torch.testing.assert_close(scores.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=2e-6)


@every_score
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(name: str, dtype: torch.dtype) -> None:
    """Values of about 300 have squares beyond float16."""
    fresh, previous = ((300 * features).to(dtype) for features in steps(2))
    scores = CHANGE_SCORES[name](fresh, previous, GRID)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, CHANGE_SCORES[name](fresh.float(), previous.float(), GRID), rtol=0, atol=0)


@every_score
@pytest.mark.parametrize("run", [12, 9])
def test_runs_of_text_tokens(name: str, run: int) -> None:
    """12 tokens are one row, 9 are taken for 3 x 3; an image narrower than a sub-block is cut into runs too."""
    fresh, previous = steps(2)
    table = torch.arange(5 * run).reshape(5, run)
    scores = CHANGE_SCORES[name](fresh, previous, table)
    expected = [BY_HAND[name](fresh, previous, tokens) for tokens in table]
    torch.testing.assert_close(scores.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=2e-6)


@every_score
def test_the_changed_sub_block_has_the_largest_score(name: str) -> None:
    previous, _ = steps(2)
    fresh = previous.clone()
    fresh[..., GRID[1], :] = fresh[..., GRID[1].flip(0), :]
    scores = CHANGE_SCORES[name](fresh, previous, GRID)
    assert scores.argmax() == 1
    untouched = scores[torch.tensor([0, 2, 3, 4, 5])]
    least = -math.log(MI_BINS) if name == "mi" else 0.0
    # The cosine of a sub-block with itself is 1 up to float32 rounding; every other score is exact here.
    torch.testing.assert_close(untouched, torch.full((5,), least), rtol=0, atol=1e-6 if name == "cosine" else 0)


@every_score
def test_padding_has_not_changed(name: str) -> None:
    """Zeros that stay zeros have the least score, also where everything is padding; nothing is NaN."""
    fresh, previous = steps(2)
    fresh[..., GRID[0], :] = previous[..., GRID[0], :] = 0
    scores = CHANGE_SCORES[name](fresh, previous, GRID)
    assert scores.isfinite().all() and scores.argmin() == 0 and (scores[1:] > scores[0]).all()
    zeros = torch.zeros(320, 3)
    nothing = CHANGE_SCORES[name](zeros, zeros, GRID)
    assert nothing.isfinite().all() and (nothing == scores[0]).all()


@every_score
def test_channels_and_batches_may_come_in_any_order(name: str) -> None:
    fresh, previous = steps(3, 2)
    order = torch.tensor([2, 0, 1])
    shuffled = CHANGE_SCORES[name](fresh[order][..., order], previous[order][..., order], GRID)
    torch.testing.assert_close(shuffled, CHANGE_SCORES[name](fresh, previous, GRID))


@every_score
def test_sub_blocks_are_scored_independently_and_alike_every_time(name: str) -> None:
    fresh, previous = steps(2)
    whole = CHANGE_SCORES[name](fresh, previous, GRID)
    assert torch.equal(whole, CHANGE_SCORES[name](fresh, previous, GRID))
    torch.testing.assert_close(CHANGE_SCORES[name](fresh, previous, GRID[[3, 1]]), whole[[3, 1]])


@every_score
def test_nothing_depends_on_the_values_of_a_tensor(name: str) -> None:
    """A meta tensor has none: `.item()`, `nonzero` and masks as indices raise there."""
    fresh = torch.empty(2, 320, 3, device="meta")
    assert CHANGE_SCORES[name](fresh, fresh.clone(), GRID.to("meta")).shape == (6,)


@pytest.mark.parametrize("name", ["l2", "ssim"])
def test_fading_further_is_more_change(name: str) -> None:
    previous, _ = steps(2)
    scores = [CHANGE_SCORES[name](fade * previous, previous, GRID) for fade in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)]
    assert all((after > before).all() for before, after in zip(scores, scores[1:], strict=False))


def test_every_turned_pair_adds_one_bit() -> None:
    previous = torch.arange(64.0)[:, None]
    for turned in range(8):
        fresh = previous.clone()
        fresh[[8 * row for row in range(turned)]] = 1000.0  # the first of a row: one pair turns
        score = CHANGE_SCORES["dhash"](fresh, previous, torch.arange(64)[None]).item()
        assert score == pytest.approx(turned / 56, rel=1e-6)


def test_mutual_information_falls_with_noise_and_does_not_see_a_change_of_scale() -> None:
    fresh, _ = steps(8)
    by_noise = [CHANGE_SCORES["mi"](fresh, steps(8, amount=amount)[1], GRID) for amount in (0.01, 0.1, 0.5, 2.0)]
    assert all((after > before).all() for before, after in zip(by_noise, by_noise[1:], strict=False))
    other = steps(8)[1]
    torch.testing.assert_close(
        CHANGE_SCORES["mi"](fresh, 4 * other, GRID), CHANGE_SCORES["mi"](fresh, other, GRID), rtol=0, atol=1e-6
    )


def test_one_token_has_no_difference_hash() -> None:
    fresh, previous = steps()
    assert (CHANGE_SCORES["dhash"](fresh, previous, torch.arange(4)[:, None]) == 0).all()


@pytest.mark.parametrize(
    ("criterion", "side", "said"),
    [
        ("ssim", 4, "ssim needs sub-blocks of at least 8 x 8 tokens, not 4 x 4.*choose from cosine, l2, mi, dhash$"),
        ("dhash", 1, "dhash needs sub-blocks of at least 2 x 2 tokens, not 1 x 1.*choose from cosine, l2, mi$"),
        ("psnr", 4, "'psnr' is not a change score; choose from cosine, l2, mi, dhash$"),
        ("psnr", 8, "choose from cosine, l2, ssim, mi, dhash$"),
    ],
)
def test_scores_that_mean_nothing_are_refused(criterion: str, side: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_score(criterion, side)


def test_scores_that_fit_are_accepted() -> None:
    for criterion in CHANGE_SCORES:
        check_score(criterion, 8)
    for criterion in ("cosine", "l2", "mi", "dhash"):
        check_score(criterion, 2)
