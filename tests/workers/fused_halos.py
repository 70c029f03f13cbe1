"""Makes steps of halo rows with kernels, in Triton's interpreter, and the same ones without, on real gloo ranks.

    TRITON_INTERPRET=1 torchrun --nproc_per_node 3 tests/workers/fused_halos.py displaced

Rank 0 prints a JSON object for each case: on every rank the largest error of a padded map, in roundings of its largest
number; how far the maps are from those without a coding, relative to that; whether both ways have sent as much, and
whether kernels keep as little.
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
from otil_xdit.exchange.buckets import LAYERS_PER_BUCKET  # noqa: E402
from otil_xdit.exchange.communicator import OtilCommunicator  # noqa: E402
from otil_xdit.method.config import OtilConfig  # noqa: E402
from otil_xdit.method.kernels import fused_on  # noqa: E402

STEPS, IMAGES = 6, 2

CASES: dict[str, dict[str, Any]] = {
    "displaced": {},
    "refreshed": {"refresh": 3},
    "as they were": {"extrapolation": "none"},
    "not coded": {"codec": "raw"},
}

LAYERS = [
    # Name, channels, rows, columns, rows above and below, dtype: vectors that are full and not, and none at all.
    (f"conv.{index}", (4, 3, 8)[index % 3], 3, (8, 5)[index % 2], *((1, 1), (0, 1), (2, 0))[index % 3], dtype)
    for index, dtype in enumerate([torch.float16] * 10 + [torch.float32] * 5 + [torch.float64, torch.float16] * 7)
]
"""More than a bucket takes, of dtypes that change within one."""


def order_of(step: int) -> list[tuple[Any, ...]]:
    """The layers of a step: one is called twice, and later some are left out."""
    return [*LAYERS, LAYERS[3]] if step < 4 else LAYERS[step % 2 :: 2]


def image(run: OtilCommunicator, seed: int) -> list[torch.Tensor]:
    """Return every padded map of an image."""
    seen = []
    generator = torch.Generator().manual_seed(seed * 100 + dist.get_rank())
    run.begin()
    run.clock.total = STEPS
    for step in range(STEPS):
        for name, channels, rows, columns, above, below, dtype in order_of(step):
            x = (torch.randn(2, channels, rows, columns, generator=generator) + step).to(dtype)
            seen.append(run.halo(name, x, above, below).clone())
        run.collect(torch.zeros(1))
        run.clock.tick()
    run.end()
    return seen


def images(way: str, case: dict[str, Any]) -> tuple[list[torch.Tensor], Any, Any, int]:
    """Return every padded map of all images, what was sent, in how many messages, and the bytes that are kept."""
    settings = {"halo": "displaced", "fresh_share": 0.0, "warmup_steps": 1, "codec": "2bit", **case}
    group = PatchGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    run = OtilCommunicator(OtilConfig(**settings, timeout=30.0), group)
    with fused_on("cpu") if way == "kernels" else nullcontext():
        seen = [one for seed in range(IMAGES) for one in image(run, seed)]
    report = run.report()
    return seen, report.sent_bytes["halo"], report.messages["halo"], report.buffer_bytes


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """Return the largest errors of a case on this rank, and whether both ways sent the same."""
    (eager, *sent, kept), (fused, *also, less) = (images(way, case) for way in ("eager", "kernels"))
    exact, *_ = images("eager", {**case, "codec": "raw"})
    return {
        "roundings": max(error(*pair) / precision(pair[0].dtype) for pair in zip(fused, eager, strict=True)),
        "coding": max(map(error, fused, exact)),
        "sent": sent == also,
        "keeps no more": less <= kept,
    }


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.dtype == expected.dtype
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def precision(dtype: torch.dtype) -> float:
    """Return the precision that kernels compute in: float32 at most."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def main() -> None:
    torch.set_num_threads(1)
    assert len(LAYERS) > LAYERS_PER_BUCKET
    dist.init_process_group("gloo")
    for name in sys.argv[1:]:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, compare(CASES[name]))
        if dist.get_rank() == 0:
            print(json.dumps({"case": name, "ranks": found}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
