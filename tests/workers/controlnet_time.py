"""Time of a denoising step with a ControlNet on the ranks of a torchrun: run whole on every rank, and shared.

    torchrun --standalone --nproc_per_node 2 tests/workers/controlnet_time.py [--rounds 5] [--strategy sync] [--size N]

The two alternate, so that what else the machine does falls on both. Rank 0 prints one JSON object: seconds of a step of
each (the median of the rounds), their ratio in each round, and the share of the floating-point operations of a step
that the ControlNet has.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit.catalog.bundled import model_folder  # noqa: E402
from otil_xdit.runtime import network_hooks  # noqa: E402

STEPS = 4
WAYS = ("whole", "shared")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--strategy", default="sync")
    parser.add_argument("--size", type=int, default=160, help="height and width, in pixels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    pipe = pipeline()
    share = share_of_flops(pipe, arguments.size)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(arguments.rounds + 1):
        for way in WAYS:
            spent = timed(pipe, way, arguments.strategy, arguments.size)
            if turn:  # the first round warms up
                seconds[way].append(spent)
    if dist.get_rank() == 0:
        ratios = [round(whole / shared, 3) for whole, shared in zip(*seconds.values(), strict=True)]
        medians = {way: round(statistics.median(spent), 4) for way, spent in seconds.items()}
        print(json.dumps({"strategy": arguments.strategy, "share": share, **medians, "ratios": ratios}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def pipeline() -> Any:
    """tiny-sd's parts round a wider U-Net of random weights, with a ControlNet of its size."""
    folder = model_folder("tiny-sd")
    config = UNet2DConditionModel.load_config(folder, subfolder="unet")
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**config, "block_out_channels": (64, 128, 256, 256)[: levels(config)]})
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        folder,
        unet=unet,
        controlnet=ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16)),
        torch_dtype=torch.float32,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def levels(config: Any) -> int:
    return len(config["block_out_channels"])


def timed(pipe: Any, way: str, strategy: str, size: int) -> float:
    """Return the seconds of a step; the slower rank's."""
    reason = {"whole": lambda control: "it is told to", "shared": network_hooks.why_whole}[way]
    with patch.object(network_hooks, "why_whole", reason):
        otil_xdit.parallelize(pipe, strategy)
        dist.barrier()
        start = time.perf_counter()
        draw(pipe, size)
        dist.barrier()
        spent = (time.perf_counter() - start) / STEPS
        otil_xdit.restore(pipe)
    return spent


def draw(pipe: Any, size: int, steps: int = STEPS) -> None:
    condition = torch.zeros(1, 3, size, size)
    generator = torch.Generator().manual_seed(3)
    given = {"height": size, "width": size, "num_inference_steps": steps, "guidance_scale": 4.0}
    pipe("a large red circle", condition, generator=generator, output_type="latent", **given)


def share_of_flops(pipe: Any, size: int) -> float:
    """Return the ControlNet's part of a step's operations."""
    counter = FlopCounterMode(mods=[pipe.controlnet, pipe.unet], display=False)
    with counter:
        draw(pipe, size, 1)
    found = counter.get_flop_counts()
    control, unet = (sum(found[type(part).__name__].values()) for part in (pipe.controlnet, pipe.unet))
    return round(control / (control + unet), 3)


if __name__ == "__main__":
    main()
