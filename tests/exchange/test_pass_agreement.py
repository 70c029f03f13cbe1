"""Ranks that compute one pass of guidance each agree on gains, and send what is alike, so that their errors are."""

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
GAINS = 8
"""Bytes of gains of keys and values: of four in 16 bits with which a payload begins, of two in 32 that passes agree on.
"""

CASES: dict[str, dict[str, Any]] = {
    "alone": {"passes": False},
    "both": {},
    "text": {"text": "rear"},
    "mixed": {"fresh_share": 0.1, "steps": 11, "ratio": 0.75},
    "tolerance": {"tolerance": 10.0, "fresh_share": 0.0},
    "displaced": {"fresh_share": 0.0},
}
"""`mixed` waits in 8 steps, warm-up among them, and sends 3 times for the step after."""


class Seen(Collectives):
    """Collectives that keep what leaves this rank as a payload."""

    payloads: list[bytes] = []

    def all_gather(self, payload: torch.Tensor, output: torch.Tensor, label: CollectiveLabel) -> Pending[torch.Tensor]:
        if label.kind == "kv" and label.phase == "steady" and payload.dtype == torch.uint8:
            Seen.payloads.append(payload.numpy().tobytes())
        return super().all_gather(payload, output, label)


def as_sent(gains: torch.Tensor) -> list[Any]:
    """Gains, float32, as a payload says them."""
    return gains.half().tolist()


def said(payload: bytes) -> list[float]:
    """The gains of a payload: of what is sent, and of what is not."""
    return torch.frombuffer(bytearray(payload[:GAINS]), dtype=torch.float16).tolist()


def run_of(passes: bool = True, text: str = "none", steps: int = STEPS, **settings: Any) -> dict[str, Any]:
    """What payloads after warm-up say of a layer, the gains that fit and are expected, and bytes of keys and values."""
    rank, Seen.payloads = dist.get_rank(), []
    alone = [dist.new_group([one]) for one in range(2)][rank]
    group = PatchGroup(alone, 0, 1, passes=PatchGroup(dist.group.WORLD, rank, 2) if passes else None)
    given = {"ratio": 0.5, "block_size": 2, "coordinates": "none", "fresh_share": 1.0, **settings}
    run = OtilCommunicator(OtilConfig(**given, timeout=20.0), group, Seen)
    run.begin()
    run.clock.total = steps
    fitted, expected = [], []
    state, velocity = torch.randn(2, 2, 1, HEADS, TOKENS, SIZE, generator=torch.Generator().manual_seed(rank))
    for step in range(steps):
        run.observe(None, TokenLayout(ROWS, COLS, text=text))  # type: ignore[arg-type]  # a literal
        run.gather("a", *(state + (step + 0.3 * rank * step**1.5) * velocity))
        if step >= OtilConfig.warmup_steps:
            residuals = run.kv.place_of("a")[0]._coder._residuals
            fitted.append(as_sent(residuals.fitted[0]))
            expected.append(residuals.expected[0].tolist())
        run.clock.tick()
    run.end()
    coder = run.kv.place_of("a")[0]._coder
    return {
        "gains": [said(one)[:2] for one in Seen.payloads],
        "of others": [said(one)[2:] for one in Seen.payloads],
        "sizes": [len(payload) for payload in Seen.payloads],
        "fitted": fitted,
        "expected": expected,
        "kv": run.report().sent_bytes["kv"]["steady"],
        "selected": coder.payload_size,
        "all": coder.most_bytes,
    }


def on_each_rank() -> dict[str, Any]:
    return {name: run_of(**case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(2, on_each_rank)


def same(ranks: list[dict[str, Any]], case: str) -> bool:
    one, other = (rank[case]["gains"] for rank in ranks)
    assert len(one) == len(other) == STEPS - OtilConfig.warmup_steps
    return bool(one == other)


@pytest.mark.parametrize("case", ["alone", "displaced"])
def test_a_payload_carries_what_was_expected_and_of_what_is_not_sent_what_was_found(
    ranks: list[dict[str, Any]], case: str
) -> None:
    for found in (rank[case] for rank in ranks):
        expected = [as_sent(torch.tensor(gains)) for gains in found["expected"]]
        assert found["gains"][1:] == expected[:-1] and len({tuple(gains) for gains in found["gains"]}) > 1
        assert found["of others"] == found["fitted"] != found["gains"]


@pytest.mark.parametrize("case", ["both", "text"])
def test_both_passes_have_the_mean_of_their_gains(ranks: list[dict[str, Any]], case: str) -> None:
    assert same(ranks, case)
    mean = torch.tensor([rank[case]["expected"] for rank in ranks]).mean(dim=0)
    assert ranks[0][case]["gains"][1:] == as_sent(mean[:-1])
    assert ranks[0][case]["fitted"] != ranks[1][case]["fitted"]


def test_while_they_wait_they_send_all_sub_blocks_where_these_are_few_more(ranks: list[dict[str, Any]]) -> None:
    """Which ones they would select differs, and to agree on that takes a message of its own."""
    for found in ranks:
        waiting = 8 - OtilConfig.warmup_steps
        assert found["mixed"]["sizes"] == [found["mixed"]["all"]] * waiting + [found["mixed"]["selected"]] * 3
        for case in ("alone", "both"):
            assert set(found[case]["sizes"]) == {found[case]["selected"]} == {found[case]["all"]}
        assert found["mixed"]["all"] > found["mixed"]["selected"]


def equal_sizes() -> tuple[int, int, float]:
    """Bytes of a payload of selected sub-blocks and of one of all, and by how much the copies miss what was sent."""
    settings = {"ratio": 0.82, "block_size": 1, "codec": "int8", "coordinates": "none", "timeout": 20.0}
    rank = dist.get_rank()
    alone = [dist.new_group([one]) for one in range(2)][rank]
    group = PatchGroup(alone, 0, 1, passes=PatchGroup(dist.group.WORLD, rank, 2))
    run = OtilCommunicator(OtilConfig(fresh_share=1.0, **settings), group)
    run.begin()
    run.clock.total = STEPS
    for step in range(STEPS):
        run.observe(None, TokenLayout(ROWS, COLS))
        given = torch.randn(2, 1, HEADS, TOKENS, SIZE, generator=torch.Generator().manual_seed(step))
        run.gather("a", *given)
        run.clock.tick()
    run.end()
    kv = run.kv.place_of("a")[0]
    copies = kv.shared_state(0)[0][0].unflatten(-1, (HEADS, SIZE)).transpose(2, 3)
    return kv._coder.payload_size, kv._coder.most_bytes, (copies - given).abs().max().item()


def test_payloads_of_all_sub_blocks_are_told_from_others_of_the_same_size() -> None:
    """The numbers of many small sub-blocks take as much as the few sub-blocks that are not sent."""
    for selected, of_all, missed in run_ranks(2, equal_sizes):
        assert selected == of_all and missed < 0.1


@pytest.mark.parametrize("case", ["tolerance", "displaced"])
def test_nothing_is_waited_for_where_ranks_may_not_meet_or_do_not_wait(ranks: list[dict[str, Any]], case: str) -> None:
    assert not same(ranks, case)


def test_what_is_agreed_on_is_counted(ranks: list[dict[str, Any]]) -> None:
    """The gains of a layer at its first step, and of all layers at each step that follows one that waited."""
    for case, agreed in (("alone", 0), ("displaced", 0), ("both", 4), ("text", 4), ("mixed", 1 + 6)):
        assert ranks[0][case]["kv"] == sum(ranks[0][case]["sizes"]) + agreed * GAINS
