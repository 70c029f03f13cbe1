"""What a layer of keys and values gets on two real ranks: with a tolerance, and in coded warm-up steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.method.config import OtilConfig
from tests.support.ranks import run_ranks

HEADS, TOKENS, SIZE = 2, 12, 4
STEPS, SETTLED = 8, 3
PLAIN = {
    "ratio": 1.0,
    "codec": "raw",
    "extrapolation": "none",
    "fresh_share": 0.0,
    "warmup_steps": 1,
    "warmup_codec": "raw",
}
"""Copies that stay as they are, so that what was sent at a step can be told from what was sent at another."""


def values(rank: int, step: int) -> torch.Tensor:
    """Keys and values, [2, 1, H, S, D]. Rank 0's change by about 1% a step; rank 1's by 20% and more, until SETTLED."""
    base = torch.randn(2, 1, HEADS, TOKENS, SIZE, generator=torch.Generator().manual_seed(rank))
    return base * (1 + 0.01 * step + rank * 0.5 * min(step, SETTLED))


def make_run(**settings: Any) -> OtilCommunicator:
    group = PatchGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    run = OtilCommunicator(OtilConfig(**settings, timeout=20.0, check=True), group)
    run.begin()
    return run


def remote_steps(tolerance: float) -> list[int]:
    """At each step: of which step the other rank's values were that this one was given."""
    run, other = make_run(**PLAIN, tolerance=tolerance), 1 - dist.get_rank()
    found = []
    for step in range(STEPS):
        seen = torch.stack(run.gather("a", *values(dist.get_rank(), step)))
        theirs = seen[:, :, :, other * TOKENS : (other + 1) * TOKENS]
        found += [at for at in range(step + 1) if torch.equal(theirs, values(other, at))]
        run.clock.tick()
    run.end()
    return found


def warmed_up(codec: str) -> dict[str, Any]:
    """After two synchronous steps: bytes, how far what was seen is off, and the copies after one step more."""
    run, rank = make_run(warmup_codec=codec), dist.get_rank()
    errors, own_is_exact = [], True
    for step in range(3):
        seen = torch.stack(run.gather("a", *values(rank, step)))
        exact = torch.cat([values(0, step), values(1, step)], dim=3)
        errors.append(float((seen - exact).abs().max() / exact.abs().max()))
        own_is_exact &= torch.equal(seen[:, :, :, rank * TOKENS : (rank + 1) * TOKENS], values(rank, step))
        run.clock.tick()
    sent = run.report().sent_bytes["kv"]["warmup"]
    group, layer = run.kv.place_of("a")
    copies = [copy.clone() for copy in group.shared_state(layer)]
    run.end()
    return {
        "sent": sent,
        "errors": errors[:2],
        "own": own_is_exact,
        "copies": [copy.numpy() for copy in copies],
    }


def on_each_rank() -> dict[str, Any]:
    found: dict[str, Any] = {f"tolerance {tolerance:g}": remote_steps(tolerance) for tolerance in (1e-4, 0.1, 10.0)}
    return {**found, **{codec: warmed_up(codec) for codec in ("int8", "raw")}}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What both found; one start for all checks."""
    return run_ranks(2, on_each_rank)


def test_a_layer_waits_while_any_rank_misses_by_more_than_the_tolerance(ranks: list[dict[str, Any]]) -> None:
    """Step 0 is the warm-up; at step 1 no error is known yet, and a layer waits; later the last step's error decides.

    At 0.1 rank 0's own error would let it go on at once; both wait until the step after rank 1 has settled.
    """
    displaced = SETTLED + 2
    for found in ranks:
        assert found["tolerance 0.0001"] == list(range(STEPS))
        assert found["tolerance 10"] == [0, 1, *range(1, STEPS - 1)]
        assert found["tolerance 0.1"] == [*range(displaced), *range(displaced - 1, STEPS - 1)]


def test_a_coded_warmup_takes_fewer_bytes(ranks: list[dict[str, Any]]) -> None:
    vectors, width = 2 * TOKENS, HEADS * SIZE
    for found in ranks:
        assert found["raw"]["sent"] == 2 * vectors * width * 4
        assert found["int8"]["sent"] == 2 * vectors * (width + 1), "a byte for each number and each vector's scale"
        assert found["raw"]["errors"] == [0, 0]
        assert all(0 < error < 1e-2 for error in found["int8"]["errors"])
        assert found["raw"]["own"] and found["int8"]["own"]


def test_copies_are_equal_after_a_coded_warmup(ranks: list[dict[str, Any]]) -> None:
    for codec in ("int8", "raw"):
        first, second = (found[codec]["copies"] for found in ranks)
        assert len(first) == len(second) == 3, "values, velocities, ages"
        assert all((one == other).all() for one, other in zip(first, second, strict=True))
