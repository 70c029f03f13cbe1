"""Real gloo ranks for tests: one process each, with a deadline, so that a test fails instead of hanging."""

from __future__ import annotations

import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

DEADLINE = 120.0


def run_ranks(world_size: int, body: Callable[..., Any], *args: Any, deadline: float = DEADLINE) -> list[Any]:
    """Call ``body(*args)`` on `world_size` ranks of a default gloo group; its results by rank.

    `body` and its results must pickle. Raises `AssertionError` with the traceback of every rank that failed, or when
    the ranks are not done after `deadline` seconds.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, folder, body, args, queue), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            outcomes = _collect(ranks, queue, time.monotonic() + deadline)
        finally:
            for process in ranks:
                process.kill()
                process.join()
    failures = [text for _, text, _ in outcomes.values() if text]
    assert not failures, "\n".join(failures)
    return [outcomes[rank][2] for rank in range(world_size)]


def _collect(ranks: list[Any], queue: Any, deadline: float) -> dict[int, tuple[int, str, Any]]:
    outcomes: dict[int, tuple[int, str, Any]] = {}
    while len(outcomes) < len(ranks):
        assert time.monotonic() < deadline, f"ranks {sorted(set(range(len(ranks))) - set(outcomes))} are not done"
        while not queue.empty():
            outcome = pickle.loads(queue.get())
            outcomes[outcome[0]] = outcome
        for rank, process in enumerate(ranks):
            if not process.is_alive() and process.exitcode and rank not in outcomes and queue.empty():
                outcomes[rank] = (rank, f"rank {rank} died with exit code {process.exitcode}", None)
        time.sleep(0.02)
    return outcomes


def _rank(rank: int, world_size: int, folder: str, body: Callable[..., Any], args: tuple, queue: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{Path(folder) / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=30),
        )
        queue.put(_by_value(rank, "", body(*args)))
        dist.barrier()
    except BaseException:
        queue.put(_by_value(rank, f"rank {rank}: {traceback.format_exc()}", None))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _by_value(rank: int, failure: str, result: Any) -> bytes:
    """Pickle what a rank says, tensors included.

    A queue of `torch.multiprocessing` hands over a tensor's file descriptor instead, which is lost when the rank has
    ended before its result is read.
    """
    return pickle.dumps((rank, failure, result))
