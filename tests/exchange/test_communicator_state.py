"""One run, many generations: what came before shows nowhere, and nothing grows, on two real ranks."""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import ref

import pytest
import torch
import torch.distributed as dist

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.dryrun.recorder import Log, RecordedCollectives
from otil_xdit.exchange import kv_copies
from otil_xdit.exchange.communicator import OtilCommunicator, OutOfMemory
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.grid import TokenLayout
from otil_xdit.method.scratch import MOST_VIEWS, ScratchBuffers
from otil_xdit.method.selection import MOST_GEOMETRIES
from tests.support.ranks import run_ranks

HEADS, SIZE, STEPS = 2, 4, 5
BOTH = ("cond/0", "cond/1", "uncond/0", "uncond/1")
"""Layers of two passes: four of a shape, which travel in one message."""

SETTINGS: dict[str, dict[str, Any]] = {
    "otil": {"ratio": 0.5},
    "polled": {"ratio": 0.5, "polling": 0.5, "select": "kv-cosine", "score_reference": "previous", "codec": "raw"},
    "oldest first": {"ratio": 0.25, "max_age": 5},
    "random": {"ratio": 0.5, "select": "random"},
    "latent": {"ratio": 0.5, "select": "latent-cosine"},
}
HISTORY = ((BOTH, 4), (BOTH[:2], 6), (BOTH, 4), (BOTH[:1], 4), (BOTH[2:], 6), (BOTH[1:], 4), (BOTH, 6))
"""Generations: which layers are called, and rows of a rank. Passes come and go with guidance, sizes at will."""


def values(rank: int, step: int, name: str, rows: int) -> torch.Tensor:
    """Keys and values, [2, 1, H, S, D]."""
    dice = torch.Generator().manual_seed(1000 * rank + 10 * rows + sum(name.encode()))
    start, slope, bend = torch.randn(3, 2, 1, HEADS, rows * 8, SIZE, generator=dice)
    return start + 0.2 * step * slope + 0.02 * step**2 * bend


def make_run(**settings: Any) -> OtilCommunicator:
    group = PatchGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    return OtilCommunicator(OtilConfig(**{"fresh_share": 0.0, "warmup_steps": 1, "timeout": 20.0, **settings}), group)


def generate(
    run: OtilCommunicator, names: tuple[str, ...], rows: int, stop_after: tuple[int, int] = (STEPS, 0)
) -> list[Any]:
    """What every call sees; an exception ends it after some steps and layers of the next one."""
    run.begin()
    seen = []
    for step in range(STEPS):
        latent = values(run.group.rank, step, "latent", rows)[0, :, 0].unflatten(1, (rows, 8)).movedim(3, 1)
        run.observe(latent, TokenLayout(rows, 8))
        for place, name in enumerate(names):
            if (step, place) == stop_after:
                run.end()
                return seen
            seen.append(torch.stack(run.gather(name, *values(run.group.rank, step, name, rows))).clone())
        run.clock.tick()
    run.end()
    return seen


def after_others() -> dict[str, list[bool]]:
    """Whether each generation of a run with a history is that of a run without one."""
    found: dict[str, list[bool]] = {}
    for setting, settings in SETTINGS.items():
        run, found[setting] = make_run(**settings), []
        for number, (names, rows) in enumerate(HISTORY):
            generate(run, names, rows, stop_after=(number % 4, 1))  # one that is broken off, and the same again
            expected = generate(make_run(**settings), names, rows)
            seen = generate(run, names, rows)
            found[setting].append(all(map(torch.equal, seen, expected)))
    return found


def test_a_generation_is_that_of_a_fresh_run() -> None:
    for found in run_ranks(2, after_others):
        assert found == {name: [True] * len(HISTORY) for name in SETTINGS}


def many_sizes() -> tuple[int, int, int]:
    run = make_run(ratio=0.5, select="random")
    for rows in range(2, MOST_GEOMETRIES + 12):
        generate(run, BOTH[:1], rows)
    return *run.selector.remembered, len(run.kv.groups)


def test_sizes_that_came_once_are_forgotten() -> None:
    for geometries, selectors, stacks in run_ranks(2, many_sizes):
        assert geometries <= MOST_GEOMETRIES + 1 and selectors <= MOST_GEOMETRIES + 1 and stacks == 1


@pytest.mark.parametrize("error", [OutOfMemory("CUDA out of memory"), RuntimeError("you can't allocate memory")])
def test_where_copies_find_no_room_the_error_names_the_flag(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise error

    monkeypatch.setattr(kv_copies, "Predictor", fail)
    nobody: Any = None
    run = OtilCommunicator(OtilConfig(), PatchGroup(nobody, 0, 2), partial(RecordedCollectives, log=Log()))
    run.begin()
    keys = torch.empty(1, HEADS, 8, SIZE, device="meta")
    run.gather("a", keys, keys)
    run.clock.tick()
    with pytest.raises(OutOfMemory, match=r"rank 0 of 2.*at step 1.*--otil_kv_cache_dtype float8"):
        run.gather("a", keys, keys)


def test_a_workspace_keeps_few_views() -> None:
    scratch = ScratchBuffers(torch.device("cpu"))
    views = [ref(scratch("a", (size,), torch.float32)) for size in range(2 * MOST_VIEWS, 0, -1)]
    assert 0 < sum(view() is not None for view in views) <= MOST_VIEWS
