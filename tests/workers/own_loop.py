"""A denoising loop of one's own on the ranks of a torchrun, against the pipeline's; rank 0 prints one JSON object.

torchrun --nproc_per_node 2 tests/workers/own_loop.py
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
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit import OtilConfig  # noqa: E402
from otil_xdit.catalog.bundled import model_folder  # noqa: E402

PROMPT, STEPS = "a large red circle", 6


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dist.init_process_group()
    pipe = StableDiffusionPipeline.from_pretrained(model_folder("tiny-sd"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    alone = own_loop(pipe)
    found: dict[str, Any] = {}
    for name in ("sync", "otil"):
        otil_xdit.parallelize(pipe, name, OtilConfig(fresh_share=0.5) if name == "otil" else None)
        own, sent = own_loop(pipe), otil_xdit.report(pipe)
        whole = pipes_own(pipe)
        found[name] = {
            "from_one_process": difference(own, alone),
            "from_the_pipeline": difference(own, whole),
            "same_bytes": sent.sent_bytes == otil_xdit.report(pipe).sent_bytes,
            "steps": sent.steps,
            "ticked": difference(own_loop(pipe, ticks=True), own),
            "ticked_steps": otil_xdit.report(pipe).steps,
        }
        otil_xdit.restore(pipe)
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def own_loop(pipe: Any, ticks: bool = False) -> torch.Tensor:
    """The final latent of a loop written out; with `ticks` it steps a scheduler that the pipeline does not know."""
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config) if ticks else pipe.scheduler
    text = torch.cat(pipe.encode_prompt(PROMPT, "cpu", 1, True)[::-1])
    scheduler.set_timesteps(STEPS)
    latent = noise() * scheduler.init_noise_sigma
    with otil_xdit.generation(pipe, steps=STEPS) as generation:
        for time in scheduler.timesteps:
            given = scheduler.scale_model_input(torch.cat([latent] * 2), time)
            without, with_text = pipe.unet(given, time, encoder_hidden_states=text).sample.chunk(2)
            latent = scheduler.step(without + 4.0 * (with_text - without), time, latent).prev_sample
            if ticks:
                generation.tick()
    return latent


def pipes_own(pipe: Any) -> torch.Tensor:
    """The final latent of the pipeline's own call."""
    call = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "latents": noise(), "output_type": "latent"}
    return pipe(PROMPT, **call).images


def noise() -> torch.Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
