"""Cards that may round differently, where every rank computes the copies of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from otil_xdit.errors import FlagError
from otil_xdit.runtime.agreement import differences
from otil_xdit.runtime.card_agreement import check_cards, facts_of_card
from otil_xdit.runtime.strategies import get_strategy
from otil_xdit.xdit.plugin.args import _resolved

CARDS = [("RTX 3090", (8, 6)), ("RTX A6000", (8, 6)), ("RTX 4090", (8, 9))]


def config(name: str, **given: Any) -> Any:
    return get_strategy(name).make_config(given)


@pytest.fixture
def be_card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let this process have `CARDS`; returns what makes one of them the current one."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(CARDS))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: CARDS[number][0])
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda number: CARDS[current[0] if number is None else number][1]
    )
    return lambda number: current.__setitem__(0, number)


def reported(be_card: Any, given: Any, *cards: int) -> dict[int, dict[str, str]]:
    """Return the facts of ranks with these cards."""
    facts = {}
    for rank, card in enumerate(cards):
        be_card(card)
        facts[rank] = facts_of_card(given)
    return facts


@pytest.mark.parametrize("name", ["otil", "compact-2bit"])
def test_cards_that_may_round_differently_are_refused(name: str, be_card: Any) -> None:
    said = differences(reported(be_card, config(name), 0, 2))
    assert "8.6 on rank 0 and 8.9 on rank 1" in said and "--otil_check" in said and "distrifusion" in said
    assert differences(reported(be_card, config(name), 0, 1)) == "", "one capability runs the same kernels"
    assert differences(reported(be_card, config(name, check=True), 0, 2)) == "", "the copies are compared instead"
    with pytest.raises(ValueError, match="differ: RTX 3090 with 8.6, RTX A6000 with 8.6, RTX 4090 with 8.9; give"):
        check_cards(config(name), 4)
    check_cards(config(name), 2)
    check_cards(config(name, check=True), 3)


@pytest.mark.parametrize("name", ["sync", "distrifusion", "naive", "otil-paper", "hybridiff"])
def test_what_keeps_what_was_sent_takes_any_cards(name: str, be_card: Any) -> None:
    assert differences(reported(be_card, config(name), 0, 2)) == ""
    check_cards(config(name), 3)


def test_processors_are_not_compared() -> None:
    assert facts_of_card(config("otil")) == {}
    check_cards(config("otil"), 8)


def test_flags_are_refused_before_weights_load(be_card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"parallel": "otil", "model": "tiny-dit", "patch_degree": 3}
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FlagError, match="--parallel otil: the cards of this host differ"):
        _resolved(values)
    assert _resolved({**values, "parallel": "sync"})[0] is not None
