"""Selection: the sub-blocks that changed most, and none forgotten."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otil_xdit.method.selection import TopKSelector, blocks_to_send


class OneLayer(TopKSelector):
    """A selector for scores [K] of one layer."""

    def select(self, scores: torch.Tensor) -> torch.Tensor:
        return super().select(scores[None])[0]


def make_selector(total: int, ratio: float, polling: float, max_age: int = 0) -> OneLayer:
    return OneLayer(total, ratio, polling, max_age, torch.device("cpu"))


@given(total=st.integers(1, 2000), ratio=st.sampled_from([1, 1 / 2, 1 / 3, 1 / 4, 1 / 8, 0.1]))
def test_count_never_exceeds_the_ratio(total: int, ratio: float) -> None:
    count = blocks_to_send(total, ratio)
    assert 1 <= count <= max(1, total * ratio + 1e-6)
    assert count == 1 or count > total * ratio - 1


@settings(deadline=None)
@given(
    total=st.integers(1, 60),
    ratio=st.floats(0.01, 1.0),
    polling=st.floats(0.01, 1.0),
    seed=st.integers(0, 99),
    skipped=st.integers(0, 50),
)
def test_polling_sends_every_sub_block_within_its_bound(total, ratio, polling, seed, skipped) -> None:
    selector = make_selector(total, ratio, polling)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(skipped):
        selector.select(torch.rand(total, generator=generator))
    sent: set[int] = set()
    for _ in range(math.ceil(total / selector.polled)):
        selected = selector.select(torch.rand(total, generator=generator)).tolist()
        assert len(selected) == len(set(selected)) == selector.count
        sent.update(selected)
    assert sent == set(range(total))


@pytest.mark.parametrize(("total", "ratio", "max_age"), [(16, 1 / 4, 4), (16, 1 / 2, 3), (60, 1 / 8, 9), (7, 1.0, 1)])
def test_no_sub_block_gets_older_than_its_bound(total: int, ratio: float, max_age: int) -> None:
    selector = make_selector(total, ratio, 0.0, max_age)
    scores, last = torch.arange(float(total)), [0] * total
    for step in range(1, 50):
        for block in selector.select(scores).tolist():
            last[block] = step
        assert step - min(last) < max_age or step < max_age
    starving = make_selector(total, ratio, 0.0)
    assert ratio == 1 or all(0 not in starving.select(scores).tolist() for _ in range(50))


@settings(deadline=None)
@given(
    total=st.integers(1, 60),
    ratio=st.floats(0.01, 1.0),
    polling=st.floats(0.0, 1.0),
    max_age=st.integers(1, 40),
    levels=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_layer_keeps_the_bound_whatever_its_scores_are(
    total: int, ratio: float, polling: float, max_age: int, levels: int, seed: int
) -> None:
    """Scores with many equal ones, and the same few in front at every step; two layers, called in turn or together."""
    selector = TopKSelector(total, ratio, polling, max_age, torch.device("cpu"), layers=2)
    bound = max(max_age, math.ceil(total / selector.count))  # more than k a step cannot be sent
    generator = torch.Generator().manual_seed(seed)
    last = [[0] * total for _ in range(2)]
    for step in range(1, 3 * bound + 2):
        scores = torch.randint(levels, (2, total), generator=generator).float()
        scores[:, : total // 2] += levels
        runs = [slice(0, 2)] if step % 3 else [slice(1, 2), slice(0, 1)]
        for run in runs:
            for layer, selected in zip(range(2)[run], selector.select(scores[run], run).tolist(), strict=True):
                assert len(set(selected)) == len(selected) == selector.count and set(selected) <= set(range(total))
                for block in selected:
                    last[layer][block] = step
        assert all(step - oldest < bound for oldest in map(min, last))


def test_without_polling_the_best_scores_win() -> None:
    scores = torch.tensor([0.1, 5.0, 0.2, 3.0, 0.0, 0.0, 0.0, 4.0])
    assert sorted(make_selector(8, 3 / 8, 0.0).select(scores).tolist()) == [1, 3, 7]


def test_a_sub_block_without_change_can_starve_without_polling_but_not_with_it() -> None:
    scores = torch.arange(16.0)
    starving, polled = make_selector(16, 1 / 4, 0.0), make_selector(16, 1 / 4, 0.5)
    assert all(0 not in starving.select(scores).tolist() for _ in range(20))
    assert any(0 in polled.select(scores).tolist() for _ in range(8))


def test_what_its_score_selected_is_not_polled_before_what_waits() -> None:
    """One of two is polled, the other is always sub-block 3; the rest are polled in turn."""
    selector = make_selector(4, 1 / 2, 0.5)
    scores = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert [sorted(selector.select(scores).tolist()) for _ in range(6)] == [[0, 3], [1, 3], [2, 3]] * 2


def test_reset_makes_generations_alike() -> None:
    selector = make_selector(10, 0.3, 1.0)
    first = [selector.select(torch.zeros(10)).tolist() for _ in range(5)]
    selector.reset()
    assert first == [selector.select(torch.zeros(10)).tolist() for _ in range(5)]


@pytest.mark.parametrize("polling", [0.0, 0.5])
def test_layers_are_selected_for_as_each_by_itself(polling: float) -> None:
    scores = torch.rand(20, 3, 12, generator=torch.Generator().manual_seed(0))
    together = TopKSelector(12, 0.5, polling, 0, torch.device("cpu"), layers=3)
    alone = [make_selector(12, 0.5, polling) for _ in range(3)]
    for step, now in enumerate(scores):
        # At odd steps two of the layers are called by themselves.
        runs = [slice(0, 3)] if step % 2 == 0 else [slice(2, 3), slice(0, 1)]
        for run in runs:
            selected = together.select(now[run], run)
            expected = [alone[layer].select(now[layer]) for layer in range(3)[run]]
            assert torch.equal(selected, torch.stack(expected))
