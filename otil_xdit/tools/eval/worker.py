"""What each rank of eval's torchruns runs: all cases of a plan, one after the other.

    torchrun --nproc_per_node 2 -m otil_xdit.tools.eval.worker PLAN.json

`generate.py` writes the plan. References are plain diffusers, each rank on its own, which makes a share of them;
variants are made by all ranks together, and the last one, which has every pipeline's image, saves it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from otil_xdit.catalog.folders import device, load_pipe
from otil_xdit.tools.common.processes import last_line, take_device
from otil_xdit.tools.common.variants import parse_variant
from otil_xdit.tools.eval.cache import DrawnImage, save_image


def main() -> None:
    """Make every case of the plan; on an error leave a note for `generate.py` and fail."""
    path = Path(sys.argv[1])
    plan = json.loads(path.read_text())
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    take_device()
    for index, case in enumerate(plan["cases"]):
        try:
            if case["variant"] is None:
                _make_references(plan, case, rank, ranks)
            else:
                _make_variant(plan, case, rank == ranks - 1)
        except Exception as error:
            note = {"case": index, "rank": rank, "error": last_line(error), "time": time.time()}
            path.with_name(f"failed-{rank}.json").write_text(json.dumps(note))
            raise
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _make_references(plan: dict[str, Any], case: dict[str, Any], rank: int, ranks: int) -> None:
    mine = case["images"][rank::ranks]
    if not mine:
        return
    pipe = load_pipe(case["folder"], case["sampler"], plan["lora"])
    for drawn in mine:
        image, seconds = _call(pipe, plan, case, drawn)
        assert image is not None, "plain diffusers gives every process its image"
        save_image(Path(plan["store"]), drawn["key"], DrawnImage(image, None, seconds))


def _make_variant(plan: dict[str, Any], case: dict[str, Any], saves: bool) -> None:
    import otil_xdit
    from otil_xdit.xdit.plugin.sessions import session_of

    otil_xdit.register()
    pipe = load_pipe(case["folder"], case["sampler"], plan["lora"])
    pipe = otil_xdit.parallelize(pipe, parse_variant(case["variant"]).strategy)
    pipe.set_progress_bar_config(disable=True)
    session = session_of(pipe)
    assert session is not None, "parallelize attaches a session on more than one rank"
    for drawn in case["images"]:
        image, seconds = _call(pipe, plan, case, drawn)
        if saves:
            assert image is not None, "the last rank has the image of every pipeline"
            report = session.report().to_dict()
            save_image(Path(plan["store"]), drawn["key"], DrawnImage(image, report, seconds))
    session.detach()


def _call(
    pipe: Any, plan: dict[str, Any], case: dict[str, Any], drawn: dict[str, Any]
) -> tuple[torch.Tensor | None, float]:
    """An image, float32 [3, H, W] in 0..1 or None on a rank without it, and the seconds that it took."""
    started = time.perf_counter()
    output = pipe(
        drawn["prompt"],
        height=plan["size"],
        width=plan["size"],
        num_inference_steps=case["steps"],
        guidance_scale=plan["guidance"],
        # On the CPU, so that the noise is the same on every machine.
        generator=torch.Generator().manual_seed(drawn["seed"]),
        output_type="pt",
    )
    image = None if output is None else output.images[0].float().cpu()
    if device().type == "cuda":
        torch.cuda.synchronize()
    return image, time.perf_counter() - started


if __name__ == "__main__":
    main()
