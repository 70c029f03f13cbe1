"""Part "links": which cards reach each other's memory, and what the ranks' messages take."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from otil_xdit.catalog.folders import device
from otil_xdit.comm.collectives import CollectiveLabel, Collectives, CounterKey
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.tools.bench.calibrate import fit
from otil_xdit.tools.check.runner import Check, Finding
from otil_xdit.tools.common.tables import table

SIZES = tuple(4**power << 14 for power in range(6))
"""Payloads of one rank in bytes: 16 KiB to 16 MiB."""

REPEATS = 7
TIMEOUT = 20.0

_LABEL = CollectiveLabel("check", "a check of the link", None)


def run(check: Check) -> Finding:
    """Time all-gathers and exchanges between neighbours."""
    answers = check.ask(measure)
    others = check.settings.ranks - 1
    rows = []
    for place, size in enumerate(SIZES):
        # The slowest rank counts.
        gather, neighbours = (max(one[way][place] for one in answers) for way in ("gather", "neighbours"))
        rows.append({"bytes": size, "gather_seconds": gather, "neighbours_seconds": neighbours})
    latency, rate = fit([(others * row["bytes"], row["gather_seconds"]) for row in rows])
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "kB a rank": lambda row: f"{row['bytes'] / 1e3:.0f}",
        "all-gather, ms": lambda row: f"{row['gather_seconds'] * 1e3:.3f}",
        "received, GB/s": lambda row: f"{others * row['bytes'] / row['gather_seconds'] / 1e9:.2f}",
        "neighbours, ms": lambda row: f"{row['neighbours_seconds'] * 1e3:.3f}",
        "each way, GB/s": lambda row: f"{row['bytes'] / row['neighbours_seconds'] / 1e9:.2f}",
    }
    reached = answers[0]["reached"]
    p2p = None if reached is None else all(all(row) for row in reached)
    said = f"{answers[0]['backend']}, {rate / 1e9:.2f} GB/s, {latency * 1e6:.0f} us"
    if p2p is not None:
        said += ", every card reaches every other's memory" if p2p else ", not all cards reach each other's memory"
    data = {"backend": answers[0]["backend"], "p2p": p2p, "reached": reached, "sizes": rows}
    return Finding(said, {**data, "rate": rate, "latency": latency}, f"{said}.\n\n{table(columns, rows)}")


def measure() -> dict[str, Any]:
    """Return this rank's seconds of both kinds of messages by size, and which cards reach which."""
    world = dist.group.WORLD
    assert world is not None, "the rank has entered it"
    collectives = Collectives(PatchGroup(world, dist.get_rank(), dist.get_world_size()), TIMEOUT)
    ways = {"gather": _gather, "neighbours": _exchange}
    times = {name: [_seconds(way, collectives, size) for size in SIZES] for name, way in ways.items()}
    cards = range(torch.cuda.device_count())
    reached = [[a == b or torch.cuda.can_device_access_peer(a, b) for b in cards] for a in cards]
    return {**times, "backend": dist.get_backend(), "reached": reached if len(cards) > 1 else None}


def _seconds(way: Callable[[Collectives, torch.Tensor], None], collectives: Collectives, size: int) -> float:
    payload = torch.zeros(size, dtype=torch.uint8, device=device())
    seconds = []
    for _ in range(REPEATS):
        dist.barrier()
        _synchronize()
        started = time.perf_counter()
        way(collectives, payload)
        _synchronize()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def _gather(collectives: Collectives, payload: torch.Tensor) -> None:
    output = payload.new_empty(collectives.group.world_size, payload.numel())
    collectives.all_gather(payload, output, _LABEL).wait()


def _exchange(collectives: Collectives, payload: torch.Tensor) -> None:
    output = torch.empty_like(payload), torch.empty_like(payload)
    shares = {CounterKey("check"): payload.nbytes}
    collectives.neighbours(payload, payload, output, (shares, shares), _LABEL).wait()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
