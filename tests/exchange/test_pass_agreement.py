"""Ranks that compute one pass of guidance each agree on gain and sub-blocks, so that their errors are alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from otil_xdit.comm.collectives import CollectiveLabel, Collectives, Pending
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.grid import TokenLayout
from tests.support.ranks import run_ranks

HEADS, ROWS, COLS, SIZE = 2, 8, 8, 4
TOKENS, STEPS = ROWS * COLS, 6
BLOCKS, SENT = TOKENS // 4, TOKENS // 8
GAINS = 8
"""Bytes of the gains of keys and values, with which a payload begins; the sent sub-blocks' numbers follow."""

CASES: dict[str, dict[str, Any]] = {
    "alone": {"passes": False},
    "both": {},
    "text": {"text": "rear"},
    "tolerance": {"tolerance": 10.0, "fresh_share": 0.0},
    "displaced": {"fresh_share": 0.0},
}


class Seen(Collectives):
    """Collectives that keep what leaves this rank as a payload."""

    payloads: list[bytes] = []

    def all_gather(self, payload: torch.Tensor, output: torch.Tensor, label: CollectiveLabel) -> Pending[torch.Tensor]:
        if label.kind == "kv" and label.phase == "steady" and payload.dtype == torch.uint8:
            Seen.payloads.append(payload.numpy().tobytes())
        return super().all_gather(payload, output, label)


def run_of(passes: bool = True, text: str = "none", **settings: Any) -> dict[str, Any]:
    """The beginnings of the payloads after warm-up, and the bytes of keys and values of a step."""
    rank, Seen.payloads = dist.get_rank(), []
    alone = [dist.new_group([one]) for one in range(2)][rank]
    group = PatchGroup(alone, 0, 1, passes=PatchGroup(dist.group.WORLD, rank, 2) if passes else None)
    given = {"ratio": 0.5, "block_size": 2, "coordinates": "none", "fresh_share": 1.0, **settings}
    run = OtilCommunicator(OtilConfig(**given, timeout=20.0), group, Seen)
    run.begin()
    run.clock.total = STEPS
    fitted = []
    state, velocity = torch.randn(2, 2, 1, HEADS, TOKENS, SIZE, generator=torch.Generator().manual_seed(rank))
    for step in range(STEPS):
        run.observe(None, TokenLayout(ROWS, COLS, text=text))  # type: ignore[arg-type]  # a literal
        run.gather("a", *(state + (step + 0.3 * rank * step**1.5) * velocity))
        if step >= OtilConfig.warmup_steps:
            group, layer = run.kv.place_of("a")
            fitted.append(group._coder._residuals.fitted[layer].numpy().tobytes())
        run.clock.tick()
    run.end()
    steady = run.report().sent_bytes["kv"]["steady"] / (STEPS - OtilConfig.warmup_steps)
    gains = [payload[:GAINS] for payload in Seen.payloads]
    return {
        "gains": gains,
        "fitted": fitted,
        "blocks": [payload[GAINS:][: 4 * SENT] for payload in Seen.payloads],
        "kv": steady,
    }


def on_each_rank() -> dict[str, Any]:
    return {name: run_of(**case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(2, on_each_rank)


def same(ranks: list[dict[str, Any]], case: str, what: str) -> bool:
    one, other = (rank[case][what] for rank in ranks)
    assert len(one) == len(other) == STEPS - OtilConfig.warmup_steps
    return bool(one == other)


@pytest.mark.parametrize("case", ["alone", "both", "displaced"])
def test_a_payload_carries_the_gain_of_the_step_before(ranks: list[dict[str, Any]], case: str) -> None:
    for found in (rank[case] for rank in ranks):
        assert found["gains"][1:] == found["fitted"][:-1] and len(set(found["gains"])) > 1


def test_both_passes_have_one_gain_and_one_selection(ranks: list[dict[str, Any]]) -> None:
    assert same(ranks, "both", "gains") and same(ranks, "both", "blocks")
    assert not same(ranks, "alone", "gains") and not same(ranks, "alone", "blocks"), "then the line above shows nothing"


def test_with_text_among_the_tokens_they_have_one_gain(ranks: list[dict[str, Any]]) -> None:
    """There may be more text in one pass than in the other, and then they have other numbers of sub-blocks."""
    assert same(ranks, "text", "gains") and not same(ranks, "text", "blocks")


@pytest.mark.parametrize("case", ["tolerance", "displaced"])
def test_nothing_is_waited_for_where_ranks_may_not_meet_or_do_not_wait(ranks: list[dict[str, Any]], case: str) -> None:
    assert not same(ranks, case, "gains")


def test_what_is_agreed_on_is_counted(ranks: list[dict[str, Any]]) -> None:
    more = {name: ranks[0][name]["kv"] - ranks[0]["alone"]["kv"] for name in CASES}
    first = GAINS / (STEPS - OtilConfig.warmup_steps)  # at the step before which none were fitted
    assert more["both"] == first + GAINS + 4 * BLOCKS and more["text"] == first + GAINS and more["displaced"] == 0
