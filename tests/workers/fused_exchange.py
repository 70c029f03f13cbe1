"""Makes steps of the exchange with kernels, in Triton's interpreter, and the same ones without, on real gloo ranks.

    TRITON_INTERPRET=1 torchrun --nproc_per_node 2 tests/workers/fused_exchange.py displaced

Rank 0 prints a JSON object for each case: on every rank the largest errors, relative to the largest number, and whether
both ways have sent as much. Cases of `PASSES` need four ranks.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from otil_xdit.comm.groups import PatchGroup  # noqa: E402
from otil_xdit.exchange.communicator import OtilCommunicator  # noqa: E402
from otil_xdit.method.config import OtilConfig  # noqa: E402
from otil_xdit.method.coordinates import AttentionWeights  # noqa: E402
from otil_xdit.method.grid import TokenLayout  # noqa: E402
from otil_xdit.method.kernels import fused_on  # noqa: E402

PATCHES = 2
BATCH, HEADS, ROWS, COLS, SIZE = 1, 2, 4, 4, 4
TOKENS, STEPS = ROWS * COLS, 5
LAYERS = ("net/a#0", "net/b#0")

CASES: dict[str, dict[str, Any]] = {
    "waiting": {"fresh_share": 1.0, "check": False},
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


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """Return the largest errors of a case on this rank, and whether both ways sent the same."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = [dist.new_group([one for one in range(size) if one // PATCHES == row]) for row in range(size // PATCHES)]
    columns = [dist.new_group([one for one in range(size) if one % PATCHES == place]) for place in range(PATCHES)]
    passes = PatchGroup(columns[rank % PATCHES], rank // PATCHES, size // PATCHES) if size > PATCHES else None
    group = PatchGroup(rows[rank // PATCHES], rank % PATCHES, PATCHES, passes=passes)
    (eager, copies, sent), (fused, theirs, also) = (image(way, group, case) for way in ("eager", "kernels"))
    return {
        "attended": max(map(error, fused, eager)),
        "copies": max(map(error, theirs, copies)),
        "sent": sent == also,
    }


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-6))


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in sys.argv[1:]:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, compare({**CASES, **PASSES}[name]))
        if dist.get_rank() == 0:
            print(json.dumps({"case": name, "ranks": found}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
