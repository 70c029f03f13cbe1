"""Whole steps of single ranks on fake CUDA tensors: nothing waits for the device, no operator mixes devices.

What a GPU would be asked is traced on a machine that has none (tests/support/fake_cuda). An operator whose result's
shape depends on numbers, or between two devices, stops the step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import cycle
from typing import Any

import pytest

from tests.support.fake_cuda.budgets import MODELS, PARTS, STEPS, TARGET_RATIOS, budgets, is_counted
from tests.support.fake_cuda.budgets import STRATEGIES as BUDGETED
from tests.support.fake_cuda.guard import why_no_guard

WORKER = "tests/workers/fake_cuda.py"
NETWORKS = ("sdxl", "sd3", "flux")
STRATEGIES = (
    "sync",
    "naive",
    "distrifusion",
    "otil-paper",
    "compact-2bit",
    "otil waiting",
    "otil displaced",
    "otil 2bit waiting",
    "otil 2bit displaced",
)
RANKS = ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (4, 0), (4, 1), (4, 3))
"""World size and rank: first, middle and last ones."""

DTYPES = ("float16", "bfloat16", "float32")

LATE_CHECK = {
    "copy from cuda at comm/finite_check.py:_Copied.__init__": 1,
    "Event.synchronize at comm/finite_check.py:_Copied.check": 1,
}
"""What a step may do with the host: copy the sums of its numbers, and look at those of the step before."""

ONCE = (
    "copy from cpu at comm/finite_check.py",
    "copy from cpu at method/",
    "copy from cpu at networks/unet/sharding.py",
    "copy from cuda at comm/finite_check.py",
    "copy from cpu at network",
    "numbers from c",
    "number from cuda at runtime/steps.py:_steps_of",
    "copy from cuda at method/coordinates.py",
    "copy from cuda at xdit/plugin/schedulers.py",
)
"""Beginnings of what the first step may do besides, once an image, a size or a set of weights: tables, timesteps,
coordinates."""

TABLES = tuple(f"copy from cpu at method/{name}.py:" for name in ("codec", "adaptive_codec", "bit_plan"))
"""What the first step after warm-up may do besides, once a process: the codecs' tables."""

pytestmark = pytest.mark.skipif(bool(why_no_guard()), reason=why_no_guard())


def made(scenes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the worker says of each scene."""
    command = [sys.executable, WORKER, json.dumps(scenes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def reduced() -> list[dict[str, Any]]:
    """Return every strategy with one network, over all networks, ranks and types in turn."""
    turns = zip(STRATEGIES, cycle(NETWORKS), cycle(RANKS), cycle(DTYPES[1:] + DTYPES), strict=False)
    return [
        {"pipeline": network, "strategy": strategy, "world_size": size, "rank": rank, "dtype": dtype}
        for strategy, network, (size, rank), dtype in turns
    ]


def whole(network: str, dtype: str) -> list[dict[str, Any]]:
    return [
        {"pipeline": network, "strategy": strategy, "world_size": size, "rank": rank, "dtype": dtype}
        for strategy in STRATEGIES
        for size, rank in RANKS
    ]


def check(outcome: dict[str, Any]) -> None:
    """Check what one scene did with the host."""
    assert outcome["error"] is None, f"{outcome['scene']}: {outcome['error']} at {outcome['at'][-8:]}"
    assert outcome["backend"] == "SDPA", f"{outcome['scene']}: attention is {outcome['backend']}'s"
    report, waits = outcome["report"], ", sync, " in outcome["scene"] or "waiting" in outcome["scene"]
    assert report["timed_steps"] == 1, f"{outcome['scene']}: one of the steps has events"
    assert report["device_exchange_seconds"] > 0 <= report["device_waited_seconds"], outcome["scene"]
    assert report["device_waited_seconds"] >= 0.001 * waits, f"{outcome['scene']}: a span of a fake device takes 1 ms"
    first, *steps = outcome["steps"]
    beyond = [what for what in first["host"] if not what.startswith(ONCE) and what not in LATE_CHECK]
    assert not beyond, f"{outcome['scene']}: at its first step {beyond}"
    for number, step in enumerate(steps, 1):
        found = {what: count for what, count in step["host"].items() if not what.startswith(TABLES) or number > 1}
        assert found == LATE_CHECK, f"{outcome['scene']}: at step {number} {found}"


def test_no_step_waits_for_the_device() -> None:
    """Every strategy, each with one of the networks, on one of the ranks and in one of the types."""
    scenes = reduced()
    outcomes = made(scenes)
    assert len(outcomes) == len(scenes)
    for outcome in outcomes:
        check(outcome)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("network", NETWORKS)
def test_no_rank_waits_for_the_device(network: str, dtype: str) -> None:
    """Every strategy on every rank."""
    for outcome in made(whole(network, dtype)):
        check(outcome)


def budgeted(*published: str) -> list[dict[str, Any]]:
    """Return scenes of published networks at their size, by "model, strategy, ranks"."""
    found = []
    for one in published:
        model, strategy, shared = one.split(", ")
        ranks, rank, cfg = PARTS[shared]
        scene = {"pipeline": model, "strategy": strategy, "world_size": ranks, "rank": rank, "cfg": cfg}
        found.append({**scene, "steps": STEPS})
    return found


def check_budget(scenes: list[dict[str, Any]]) -> None:
    outcomes = made(scenes)
    assert [outcome["error"] for outcome in outcomes] == [None] * len(scenes)
    assert [excess for outcome in outcomes for excess in outcome["excesses"]] == []


def test_a_step_of_a_published_network_keeps_its_budget() -> None:
    """What it launches, the bytes that move, the messages (tests/budgets/launches.json; docs/results/launches.md)."""
    check_budget(budgeted("SDXL, otil displaced, 2 ranks", "SD3, otil warm-up, 4 ranks", "SD3, otil waiting, 2 ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("shared", PARTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_step_of_published_networks_keeps_its_budget(model: str, shared: str) -> None:
    strategies = [strategy for strategy in BUDGETED if is_counted(model, PARTS[shared][2])]
    check_budget(budgeted(*(f"{model}, {strategy}, {shared}" for strategy in strategies)))


def test_steps_have_as_few_launches_as_they_should() -> None:
    """The ceilings themselves are within the aims."""
    kept = budgets()
    for key, budget in kept.items():
        model, strategy, *_ = key.split(", ")
        if strategy != "plain":
            assert budget["launches"] <= TARGET_RATIOS[strategy] * kept[f"{model}, plain"]["launches"], key
