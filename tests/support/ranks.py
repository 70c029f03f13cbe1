"""Real gloo ranks for tests: one process each, with a deadline, so that a test fails instead of hanging."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.fork_server import ForkedProcess, kill_all, server

DEADLINE = 120.0


def run_ranks(world_size: int, body: Callable[..., Any], *args: Any, deadline: float = DEADLINE) -> list[Any]:
    """Call ``body(*args)`` on `world_size` ranks of a default gloo group; its results by rank.

    `body` and its results must pickle. Raises `AssertionError` with the traceback of every rank that failed, or when
    the ranks are not done after `deadline` seconds.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "body").write_bytes(pickle.dumps((body, args)))
        ranks = [
            server(rank).fork(_rank, rank, world_size, folder, environment=environment, path=sys.path)
            for rank in range(world_size)
        ]
        try:
            outcomes = _collect(ranks, folder, time.monotonic() + deadline)
        finally:
            kill_all(ranks)
    failures = [text for text, _ in outcomes.values() if text]
    assert not failures, "\n".join(failures)
    return [outcomes[rank][1] for rank in range(world_size)]


def _collect(ranks: list[ForkedProcess], folder: Path, deadline: float) -> dict[int, tuple[str, Any]]:
    """Return by rank what went wrong, or nothing, and the result."""
    outcomes: dict[int, tuple[str, Any]] = {}
    while len(outcomes) < len(ranks):
        assert time.monotonic() < deadline, f"ranks {sorted(set(range(len(ranks))) - set(outcomes))} are not done"
        for rank, process in enumerate(ranks):
            exit_code = process.wait(0)  # before looking for its result, which it writes before it ends
            if rank not in outcomes and (folder / str(rank)).exists():
                outcomes[rank] = pickle.loads((folder / str(rank)).read_bytes())
            elif rank not in outcomes and exit_code is not None:
                outcomes[rank] = (f"rank {rank} died with exit code {exit_code}", None)
        time.sleep(0.01)
    return outcomes


def _rank(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=30),
        )
        body, args = pickle.loads((folder / "body").read_bytes())
        _hand_over(folder / str(rank), "", body(*args))
        with contextlib.suppress(RuntimeError):  # it fails where another rank has died, which is then named itself
            dist.barrier()
    except BaseException:
        _hand_over(folder / str(rank), f"rank {rank}: {traceback.format_exc()}", None)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _hand_over(place: Path, failure: str, result: Any) -> None:
    """Write what a rank says, so that it is there as a whole or not at all."""
    partial = place.with_suffix(".partial")
    partial.write_bytes(pickle.dumps((failure, result)))
    partial.replace(place)
