"""PSNR of images with a ControlNet on the ranks of a torchrun from those of one process.

    torchrun --standalone --nproc_per_node 2 tests/workers/controlnet_fidelity.py [--strategies otil distrifusion]

tiny-sd with a ControlNet that copies its encoder; the convolutions that give its residuals, which begin with zeros, are
drawn. Rank 0 prints a JSON line for each strategy: dB of each image with the ControlNet shared, and with it whole on
every rank; and by how much the ControlNet changes the images.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit.catalog.bundled import model_folder  # noqa: E402
from otil_xdit.runtime import network_hooks  # noqa: E402

PROMPTS = (
    "a large red circle on the left, striped background",
    "a small blue square on the right, dotted background",
    "a green triangle in the middle, plain background",
)
STEPS = 15
FOURFOLD = (8, 16, 16)
"""Channels of an embedding that makes one row of four, as tiny-sd's VAE does."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--strategies", nargs="+", default=["sync", "otil", "distrifusion"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    pipe = pipeline()
    exact, without = images(pipe), images(pipe, controlnet_conditioning_scale=0.0)
    changed = [decibels(*pair) for pair in zip(without, exact, strict=True)]
    for strategy in arguments.strategies:
        found = {way: measured(pipe, strategy, way, exact) for way in ("shared", "whole")}
        if dist.get_rank() == 0:
            print(json.dumps({"strategy": strategy, **found, "without a ControlNet": changed}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def pipeline() -> Any:
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        model_folder("tiny-sd"),
        controlnet=None,
        torch_dtype=torch.float32,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    torch.manual_seed(0)
    pipe.register_modules(controlnet=ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=FOURFOLD))
    adding = (pipe.controlnet.controlnet_down_blocks, pipe.controlnet.controlnet_mid_block)
    for parameter in (
        *pipe.controlnet.controlnet_cond_embedding.parameters(),
        *(p for a in adding for p in a.parameters()),
    ):
        torch.nn.init.normal_(parameter, std=0.05)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measured(pipe: Any, strategy: str, way: str, exact: list[torch.Tensor]) -> list[float]:
    reason = {"whole": lambda control: "it is told to", "shared": network_hooks.why_whole}[way]
    with patch.object(network_hooks, "why_whole", reason):
        otil_xdit.parallelize(pipe, strategy)
        made = images(pipe)
        otil_xdit.restore(pipe)
    return [decibels(*pair) for pair in zip(made, exact, strict=True)]


def images(pipe: Any, **settings: Any) -> list[torch.Tensor]:
    condition = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(5))
    usual = {"image": condition, "num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "pt"}
    return [
        pipe(prompt, **{**usual, **settings}, generator=torch.Generator().manual_seed(number)).images
        for number, prompt in enumerate(PROMPTS)
    ]


def decibels(made: torch.Tensor, exact: torch.Tensor) -> float:
    error = (made - exact).square().mean().item()
    return round(-10 * math.log10(error), 1) if error else math.inf


if __name__ == "__main__":
    main()
