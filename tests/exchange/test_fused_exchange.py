"""Whole steps of the exchange with kernels, in Triton's interpreter, beside the same steps without, on real ranks."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.coordinates import AttentionWeights
from otil_xdit.method.grid import TokenLayout
from otil_xdit.method.kernels import fused_on
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")

BATCH, HEADS, ROWS, COLS, SIZE = 1, 2, 4, 4, 4
TOKENS, STEPS = ROWS * COLS, 5
LAYERS = ("net/a#0", "net/b#0")

CASES: dict[str, dict[str, Any]] = {
    "waiting": {"fresh_share": 1.0},
    "displaced": {"fresh_share": 0.0, "check": False},
    "displaced, checked": {"fresh_share": 0.0},
    "refreshed": {"fresh_share": 0.0, "refresh": 2, "check": False},
    "everything is sent": {"fresh_share": 0.0, "ratio": 1.0, "check": False},
    "2 bits": {"fresh_share": 0.0, "codec": "2bit", "coordinates": "none"},
    "measured": {"fresh_share": 0.0, "weights": False, "check": False},
    "constant gain": {"fresh_share": 0.0, "extrapolation": "constant", "check": False},
    "previous": {"fresh_share": 0.0, "score_reference": "previous"},
    "raw warm-up": {"fresh_share": 0.0, "warmup_codec": "raw"},
}

PASSES: dict[str, dict[str, Any]] = {"agreed": {"fresh_share": 1.0}, "agreed on gains": {"text": "rear"}}
"""Of four ranks, two of each pass."""

ERROR = 1e-5
"""Of the largest number: sums in another order. These numbers have none that fall to the other side of a border."""


def weights(seed: int) -> AttentionWeights:
    generator = torch.Generator().manual_seed(seed)
    parts = (torch.randn(HEADS * SIZE, HEADS * SIZE, generator=generator) for _ in range(4))
    return AttentionWeights(HEADS, *parts)


def image(way: str, group: PatchGroup, case: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
    """What is attended to at each step by each layer, the copies at the end, and what was sent."""
    settings = {"ratio": 0.5, "block_size": 2, "fresh_share": 0.5, "warmup_steps": 2, "check": True, **case}
    text, has_weights = settings.pop("text", "none"), settings.pop("weights", True)
    run, rank = OtilCommunicator(OtilConfig(**settings, timeout=30.0), group), dist.get_rank()
    if has_weights:
        run.set_weights({name.partition("#")[0]: weights(number) for number, name in enumerate(LAYERS)})
    seen = []
    generator = torch.Generator().manual_seed(rank)
    state, velocity, curve = torch.randn(3, len(LAYERS), 2, BATCH, HEADS, TOKENS, SIZE, generator=generator)
    with fused_on("cpu") if way == "kernels" else nullcontext():
        run.begin()
        run.clock.total = STEPS
        for step in range(STEPS):
            run.observe(None, TokenLayout(ROWS, COLS, text=text))
            for name, start, moved, bent in zip(LAYERS, state, velocity, curve, strict=True):
                key_value = start + 0.2 * step * moved + 0.05 * step**1.5 * bent
                seen.append(torch.stack(run.gather(name, *key_value)).clone())
            run.clock.tick()
        run.end()
        copies = [kept.clone() for name in LAYERS for kept in run.kv.place_of(name)[0].shared_state(0)]
    return seen, copies, run.report().sent_bytes


def compare(cases: dict[str, dict[str, Any]], patches: int) -> dict[str, dict[str, Any]]:
    """The largest errors of each case, and whether both ways sent the same."""
    found, rank, size = {}, dist.get_rank(), dist.get_world_size()
    rows = [dist.new_group([one for one in range(size) if one // patches == row]) for row in range(size // patches)]
    columns = [dist.new_group([one for one in range(size) if one % patches == place]) for place in range(patches)]
    passes = PatchGroup(columns[rank % patches], rank // patches, size // patches) if size > patches else None
    group = PatchGroup(rows[rank // patches], rank % patches, patches, passes=passes)
    for name, case in cases.items():
        (eager, copies, sent), (fused, theirs, also) = (image(way, group, case) for way in ("eager", "kernels"))
        found[name] = {
            "attended": max(map(error, fused, eager)),
            "copies": max(map(error, theirs, copies)),
            "sent": sent == also,
        }
    return found


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-6))


def check(ranks: list[dict[str, dict[str, Any]]]) -> None:
    for found in ranks:
        for name, case in found.items():
            assert case["sent"], f"{name}: kernels send as much"
            assert case["attended"] < ERROR and case["copies"] < ERROR, f"{name}: {case}"


def test_displaced_steps_with_kernels_are_those_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check(run_ranks(2, compare, {"displaced": CASES["displaced"]}, 2))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "displaced"])
def test_steps_with_kernels_are_those_without(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check(run_ranks(2, compare, {case: CASES[case]}, 2))


@pytest.mark.slow
@pytest.mark.parametrize("case", PASSES)
def test_passes_with_kernels_agree_as_those_without(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check(run_ranks(4, compare, {case: PASSES[case]}, 2, deadline=300.0))
