"""What real ranks count, for `otil-xdit plan` to be compared with; rank 0 prints one JSON object for each case.

torchrun --nproc_per_node 2 tests/workers/planned_bytes.py CASES.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit.catalog.folders import OWN, find_model, load_pipe  # noqa: E402
from otil_xdit.tools.common.variants import parse_variant  # noqa: E402
from otil_xdit.xdit.plugin.sessions import session_of  # noqa: E402
from tests.support.in_rank import tell  # noqa: E402


def main() -> None:
    otil_xdit.register()
    torch.set_num_threads(1)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        tell(case, reported(case))
    dist.barrier()
    dist.destroy_process_group()


def reported(case: dict[str, Any]) -> dict[str, Any]:
    """This rank's report of one image."""
    variant = parse_variant(case["strategy"])
    pipe, given = load_pipe(find_model(case["model"]).folder, OWN, None), {}
    if case["controlnets"]:
        nets = [
            ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16, 16))
            for _ in range(case["controlnets"])
        ]
        pipe = StableDiffusionControlNetPipeline(**pipe.components, controlnet=nets)
        given = {"image": [torch.zeros(1, 3, case["height"], case["width"])] * len(nets)}
    pipe = otil_xdit.parallelize(
        pipe,
        variant.preset,
        variant.config,
        ulysses_degree=case["ulysses"],
        use_cfg_parallel=case["cfg"] > 1,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe(
        "a large red circle",
        height=case["height"],
        width=case["width"],
        num_inference_steps=case["steps"],
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **given,
    )
    session = session_of(pipe)
    assert session is not None, "parallelize attaches a session on more than one rank"
    report = session.report().to_dict()
    session.detach()
    return report


if __name__ == "__main__":
    main()
