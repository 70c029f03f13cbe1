"""A codec and a change score that another package registers, in the exchange of one layer and in the settings."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.method.codecs import CODECS
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.grid import TokenLayout
from otil_xdit.method.scores import CHANGE_SCORES, ChangeScore
from tests.support.another_package import Half, first_number_change, register
from tests.support.ranks import run_ranks

HEADS, ROWS, COLS, SIZE, STEPS = 2, 4, 4, 4, 6


def values(rank: int, step: int) -> torch.Tensor:
    """Keys and values of a rank at a step, [2, 1, H, S, D]."""
    start, slope = torch.randn(2, 2, 1, HEADS, ROWS * COLS, SIZE, generator=torch.Generator().manual_seed(rank))
    return start + 0.1 * step * slope


def run_steps(**settings: object) -> tuple[float, float]:
    """Exchange some steps of one layer; how far the last one's values are off, relative to theirs, and bytes sent."""
    rank = dist.get_rank()
    config = OtilConfig(**settings, block_size=2, warmup_steps=2, check=True, timeout=20.0)
    run = OtilCommunicator(config, PatchGroup(dist.group.WORLD, rank, dist.get_world_size()))
    run.begin()
    for step in range(STEPS):
        run.observe(None, TokenLayout(ROWS, COLS))
        seen = torch.stack(run.gather("a", *values(rank, step)))
        exact = torch.cat([values(0, step), values(1, step)], dim=3)
        error = ((seen - exact).norm() / exact.norm()).item()
        run.clock.tick()
    sent = run.report().kv_bytes_per_step
    run.end()
    return error, sent


def exchanged() -> dict[str, tuple[float, float]]:
    """Errors and bytes by codec; every layer's copies are compared at every step."""
    register()
    all_of_it = {"freshness": "fresh", "ratio": 1.0}
    part_of_it = {"freshness": "fresh", "ratio": 0.5, "select": "kv-first"}
    return {
        "raw": run_steps(**all_of_it, codec="raw", warmup_codec="raw"),
        "half": run_steps(**all_of_it, codec="half", warmup_codec="half"),
        "half-values": run_steps(**all_of_it, codec="half-values", warmup_codec="half-values"),
        "part, raw": run_steps(**part_of_it, codec="raw"),
        "part, half": run_steps(**part_of_it, codec="half"),
        "part, half-values": run_steps(**part_of_it, codec="half-values"),
    }


def test_a_codec_and_a_change_score_of_another_package() -> None:
    here, there = run_ranks(2, exchanged)
    raw, half, values = (here[name] for name in ("raw", "half", "half-values"))
    assert raw[0] == 0 < half[0] <= values[0] < 2**-10, "float16 has 11 bits, and residuals are smaller than values"
    assert [sent for _, sent in (half, values)] == pytest.approx([raw[1] / 2] * 2, rel=0.1)
    part = [here[f"part, {name}"] for name in ("raw", "half", "half-values")]
    assert [error for error, _ in part] == pytest.approx([part[0][0]] * 3, abs=2**-10)
    assert part[1][1] == part[2][1] < part[0][1] < raw[1]
    assert [sent for _, sent in there.values()] == [sent for _, sent in here.values()]


def test_settings_know_what_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="codec is 'half'; choose from raw, int8, int4, 2bit, 1bit, adaptive$"):
        OtilConfig(codec="half")
    with pytest.raises(ValueError, match="select is 'kv-first'; choose from .*kv-dhash, random$"):
        OtilConfig(select="kv-first")
    monkeypatch.setitem(CODECS, "half", lambda dtype: Half(of_residuals=True))
    monkeypatch.setitem(CHANGE_SCORES, "first", ChangeScore(first_number_change, least_side=3))
    assert OtilConfig(codec="half", select="latent-first").codec == "half"
    with pytest.raises(ValueError, match="choose from raw, int8, int4, 2bit, 1bit, adaptive, half$"):
        OtilConfig(codec="other")
