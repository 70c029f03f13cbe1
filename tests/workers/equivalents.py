"""How close equivalent networks' images on the ranks of a torchrun are to one process's; one line a model.

torchrun --nproc_per_node 2 tests/workers/equivalents.py VARIANT [PRESET]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit.catalog.folders import OWN, find_model, load_pipe  # noqa: E402
from otil_xdit.tools.common.variants import parse_variant  # noqa: E402
from otil_xdit.tools.eval.equivalents import parse_equivalent  # noqa: E402
from otil_xdit.tools.eval.metrics import psnr  # noqa: E402
from otil_xdit.xdit.plugin.sessions import session_of  # noqa: E402

SAMPLERS = {"tiny-sd": "dpm-solver", "tiny-sdxl": "dpm-solver", "tiny-dit": OWN}
STEPS = 12


def main() -> None:
    otil_xdit.register()
    torch.set_num_threads(1)
    for model, sampler in SAMPLERS.items():
        folder = find_model(model).folder
        pipe = load_pipe(folder, sampler, None)
        best = image(pipe)
        found = {"model": model, "shipped": psnr(shared(pipe), best)}
        changed = load_pipe(folder, sampler, None)
        parse_equivalent(sys.argv[1]).apply(changed.transformer if model == "tiny-dit" else changed.unet)
        found["changed"] = psnr(shared(changed), best)
        if dist.get_rank() == dist.get_world_size() - 1:
            print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def shared(pipe: Any) -> torch.Tensor:
    """The image of all ranks together; the last one has every pipeline's."""
    variant = parse_variant(sys.argv[2] if len(sys.argv) > 2 else "otil")
    wrapped = otil_xdit.parallelize(pipe, variant.preset, variant.config)
    made = image(wrapped)
    session = session_of(wrapped)
    assert session is not None, "parallelize attaches a session on more than one rank"
    session.detach()
    return made


def image(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    output = pipe(
        "a large red circle on the left and a small blue square on the right, striped background",
        height=128,
        width=128,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    return torch.zeros(3, 128, 128) if output is None else output.images[0].float().cpu()


if __name__ == "__main__":
    main()
