"""Step caches of DiTs on patches: alike on all ranks, exact against the same cache on one process, or refused."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from torch import nn

from otil_xdit.catalog.architectures import ARCHITECTURES
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.networks.dit.keys import DitKeys
from otil_xdit.networks.dit.step_cache import cache_of, check_cache, comparing
from otil_xdit.networks.dit.token_counts import Tokens
from tests.support.dits import CASES
from tests.support.torchrun import lines_of

TOLERANCE = 5e-5
COMPARING = ("xDiT's", "first block")
"""Caches that compare tokens, by their case; the others count steps."""


@cache
def results(ranks: int) -> dict[str, list[dict[str, Any]]]:
    return {line["case"]: line["ranks"] for line in lines_of(ranks, "step_caches.py", timeout=600)}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_cache_on_patches_is_that_of_one_process(ranks: int) -> None:
    found = results(ranks)
    assert len(found) == 8
    for case, by_rank in found.items():
        for one in by_rank:
            assert "refused" not in one, (case, one)
            assert one["error"]["sync"] <= TOLERANCE, case
            assert one["sync"] == one["alone"] < one["without"], f"{case}: other blocks were left out"
            assert one["otil"] < one["without"], case
            compares = any(word in case for word in COMPARING)
            assert one["apart"] == compares, f"{case}: ranks that ask nobody would decide the same"
        assert len({str(one["messages"]["kv"]) for one in by_rank}) == 1, (
            f"{case}: a rank has sent what others have not"
        )
        assert len({one["otil"] for one in by_rank}) == 1, case


def cached_network() -> Any:
    network = CASES["wan, 27 tokens"].build().transformer
    network.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    return network


def test_comparing_leaves_nothing_behind_and_begins_empty() -> None:
    network = cached_network()
    hook = network.blocks[0]._diffusers_hook.hooks["fbc_leader_block_hook"]
    before = dict(vars(hook))
    found = cache_of(network)
    assert found is not None and found.says == "FirstBlockCacheConfig(threshold=0.1)"
    asked = []

    def distance(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        asked.append(torch.equal(before, now))
        return torch.tensor(0.05)

    with comparing(found, distance):
        hook.state_manager.set_context(SimpleNamespace(name="cond"))
        state, residual = hook.state_manager.get_state(), torch.ones(1, 2, 3)
        assert hook._should_compute_remaining_blocks(residual), "there is nothing to compare with"
        state.head_block_residual = residual
        assert not hook._should_compute_remaining_blocks(residual) and asked == [True]
    assert vars(hook) == before
    with comparing(found, distance):
        hook.state_manager.set_context(SimpleNamespace(name="cond"))
        assert hook.state_manager.get_state().head_block_residual is None, "another image's is still there"


@pytest.mark.parametrize(
    ("kind", "cfg_degree", "reason"),
    [
        ("WanTransformer3DModel", 1, None),
        ("WanTransformer3DModel", 2, "each half of the ranks has one pass"),
        ("ZImageTransformer2DModel", 1, "nobody has compared one"),
    ],
)
def test_what_ranks_would_decide_apart_is_refused(kind: str, cfg_degree: int, reason: str | None) -> None:
    network = cached_network()
    found = cache_of(network)
    assert found is not None
    if reason is None:
        check_cache("transformer", network, found, ARCHITECTURES[kind], cfg_degree)
        return
    with pytest.raises(ValueError, match=rf"FirstBlockCacheConfig.*transformer: {reason}"):
        check_cache("transformer", network, found, ARCHITECTURES[kind], cfg_degree)


def test_a_network_without_a_cache_has_none() -> None:
    assert cache_of(nn.Sequential(nn.Linear(2, 2))) is None


@pytest.mark.parametrize(
    ("shares", "place", "tokens", "real"),
    [((), 0, 4, None), ((), 2, 4, None), ((), 3, 4, [0, 1]), ((5, 3), 1, 5, None), ((5, 3), 3, 3, [0])],
)
def test_padding_is_not_compared(shares: tuple[int, ...], place: int, tokens: int, real: list[int] | None) -> None:
    """14 tokens, filled up to 16, on 2 patches x 2 Ulysses."""
    keys = DitKeys(PatchGroup(None, 0, 2, ulysses_degree=2), (0, 1), shares)  # type: ignore[arg-type]  # nothing is sent
    keys._counts = {"image": Tokens(14)}
    found = keys.real_tokens(tokens, place, torch.device("cpu"))
    assert (None if found is None else found.tolist()) == real
