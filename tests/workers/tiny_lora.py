"""What the shipped LoRA makes on the ranks of a torchrun and on one process; rank 0 prints one JSON object.

torchrun --nproc_per_node 2 tests/workers/tiny_lora.py
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import StableDiffusionPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit import OtilConfig  # noqa: E402
from otil_xdit.catalog.bundled import model_folder  # noqa: E402
from otil_xdit.networks.unet.layers import unwrapped_layers  # noqa: E402
from otil_xdit.xdit.plugin.sessions import session_of  # noqa: E402

PROMPT = "a large red circle on the left and a small blue square on the right, striped background"


def main() -> None:
    otil_xdit.register()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    pipe = StableDiffusionPipeline.from_pretrained(model_folder("tiny-sd"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    plain = image(pipe)
    pipe.load_lora_weights(model_folder("tiny-sd-lora"))
    alone = image(pipe)
    otil_xdit.parallelize(pipe, config=OtilConfig(freshness="sync"))
    together = image(pipe)
    found = {
        "unwrapped": unwrapped_layers(pipe.unet),
        "max_error": (together - alone).abs().max().item(),
        "changed_by_lora": (alone - plain).abs().max().item(),
        "messages": session_of(pipe).report().messages,
        "yellow": [yellow(made) for made in (plain, alone, together)],
    }
    session_of(pipe).detach()
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def yellow(image: torch.Tensor) -> float:
    """Share of pixels with much red and green and little blue."""
    red, green, blue = image[0]
    return ((red > 0.6) & (green > 0.5) & (blue < 0.45)).float().mean().item()


def image(pipe: Any) -> torch.Tensor:
    """An image, [1, 3, 128, 128], of values in 0..1."""
    draw = torch.Generator().manual_seed(3)
    return pipe(PROMPT, num_inference_steps=6, guidance_scale=4.0, generator=draw, output_type="pt").images


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
