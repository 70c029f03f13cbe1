"""Layers of equal shape that travel together get what each would get by itself, in fewer messages, from fixed room."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from otil_xdit.comm.collectives import CounterKey
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.exchange import kv
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.grid import TokenLayout
from otil_xdit.runtime.strategies import get_strategy
from tests.support.ranks import run_ranks

ROWS, COLS, HEADS, STEPS = 4, 8, 2, 12
LAYERS = {**{f"wide.{at}": 8 for at in range(4)}, "narrow": 4, **{f"late.{at}": 8 for at in range(3)}}
"""Names and features a head, in the order of the calls: four of a shape, one of another, three of the first again."""

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "all of it": {"ratio": 1.0},
    "raw": {"codec": "raw", "ratio": 0.25},
    "raw and predicted by no rule": {
        "codec": "raw",
        "extrapolation": "none",
        "ratio": 0.5,
        "score_reference": "previous",
    },
    "one bit, polled": {"codec": "1bit", "ratio": 0.5, "polling": 0.5},
    "cosine": {"select": "kv-cosine", "ratio": 0.5},
    "random": {"select": "random", "ratio": 0.5},
    "bfloat16": {"kv_cache_dtype": "bfloat16", "codec": "int8"},
    "float8": {"kv_cache_dtype": "float8", "codec": "int4"},
    "by tolerance": {"tolerance": 0.3},
    "waiting": {"fresh_share": 0.5},
    "refreshed": {"refresh": 3},
}


def values(rank: int, step: int, layer: str) -> torch.Tensor:
    """Keys and values, [2, B, H, S, D], on curves of their own."""
    dice = torch.Generator().manual_seed(rank * 1000 + sum(layer.encode()))
    start, slope, bend = torch.randn(3, 2, 2, HEADS, ROWS * COLS, LAYERS[layer], generator=dice)
    return start + 0.1 * step * slope + 0.01 * step**2 * bend


def called(step: int) -> list[str]:
    """Every layer, but for two of the first four at one step and all of the last three at another."""
    skipped = {5: ("wide.1", "wide.3"), 7: tuple(name for name in LAYERS if name.startswith("late"))}.get(step, ())
    return [name for name in LAYERS if name not in skipped]


def make_run(**settings: Any) -> OtilCommunicator:
    group = PatchGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    return OtilCommunicator(OtilConfig(**{"fresh_share": 0.0, "timeout": 20.0, **settings}), group)


def generate(run: OtilCommunicator, layers: Any = called) -> list[torch.Tensor]:
    run.begin()
    run.clock.total = STEPS
    seen = []
    for step in range(STEPS):
        run.observe(None, TokenLayout(ROWS, COLS))
        for name in layers(step):
            seen.append(torch.stack(run.gather(name, *values(run.group.rank, step, name))).clone())
        run.clock.tick()
    run.end()
    return seen


def each_way() -> dict[str, tuple[bool, int, int]]:
    """Whether a run with stacks sees what one without sees, and the messages of both."""
    found = {}
    for name, settings in SETTINGS.items():
        together = make_run(**settings)
        generate(together)
        first = generate(together)  # not the first image: its stacks are made
        most, kv.MOST_LAYERS = kv.MOST_LAYERS, 1
        alone = make_run(**settings)
        second = generate(alone)
        kv.MOST_LAYERS = most
        same = all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        found[name] = (same, *(run.report().messages["kv"]["steady"] for run in (together, alone)))
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_together_as_alone(world_size: int) -> None:
    """Bit for bit, whatever is sent and however it is picked; also where layers are left out at some steps."""
    for found in run_ranks(world_size, each_way):
        assert {name: same for name, (same, _, _) in found.items()} == dict.fromkeys(SETTINGS, True)
        # 10 steps of 3 stacks; the step without two of four layers leaves two runs of 1, the one without three none.
        assert found["default"][1:] == (10 * 3 + 1 - 1, 10 * 8 - 2 - 3)


def test_a_stack_leaves_time_to_travel() -> None:
    """Of eight equal layers no message waits for more than half of the step."""
    run_ranks(2, check_a_long_network)


def check_a_long_network() -> None:
    run = make_run()
    run.begin()
    given = values(run.group.rank, 0, "wide.0")
    for step in range(4):
        run.observe(None, TokenLayout(ROWS, COLS))
        sent = []
        for layer in range(8):
            run.gather(str(layer), *given)
            sent.append(run.collectives.traffic.messages[CounterKey("kv")])
        assert step < 2 or sent[3] == sent[2] + 1, "half of them are under way while the other half compute"
        run.clock.tick()
    run.end()


class Allocations(TorchDispatchMode):
    """Counts what operations return that lies in no storage seen before, by bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[int] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {found.untyped_storage().data_ptr() for found in tensors_in((args, kwargs))}
        result = operation(*args, **(kwargs or {}))
        for made in tensors_in(result):
            if made.untyped_storage().data_ptr() not in given:
                self.sizes[made.untyped_storage().nbytes()] += 1
        return result


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def largest_allocation(settings: dict[str, Any], strategy: str) -> int:
    """Bytes, in `gather` at a step after the first image."""
    config = get_strategy(strategy).make_config({"timeout": 20.0, **settings})
    run = OtilCommunicator(config, PatchGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size()))
    generate(run, lambda step: list(LAYERS))
    run.begin()
    run.clock.total = STEPS
    detector = Allocations()
    for step in range(STEPS):
        run.observe(None, TokenLayout(ROWS, COLS))
        for name in LAYERS:
            given = values(run.group.rank, step, name)
            with detector:
                run.gather(name, *given)
        run.clock.tick()
    run.end()
    return max(detector.sizes, default=0)


def largest_allocations() -> dict[str, int]:
    presets = {name: largest_allocation({}, name) for name in ("distrifusion", "sync", "compact-2bit")}
    ours = {name: largest_allocation({"fresh_share": 0.0, **given}, "otil") for name, given in SETTINGS.items()}
    return {**ours, **presets}


def test_nothing_large_is_allocated_after_the_first_image() -> None:
    """In any mode of any step. What is left is a number a token or sub-block, as scores and ages, but for scores that
    compare two operands."""
    one_layer = 2 * 2 * HEADS * ROWS * COLS * 8 * 4
    a_number_a_token = 4 * 2 * 2 * 2 * ROWS * COLS * 4  # of four layers, two ranks, keys and values, two images
    assert a_number_a_token < one_layer
    by_two_operands = {"cosine", "raw and predicted by no rule"}
    found = run_ranks(2, largest_allocations)[0]
    large = {name for name, size in found.items() if size > a_number_a_token}
    assert large == by_two_operands, {name: found[name] for name in large}
