"""What the shipped model makes on the ranks of a torchrun; prints one JSON object on the rank that has the images.

torchrun --nproc_per_node 2 tests/workers/tiny_dit.py
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import StableDiffusion3Pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit import OtilConfig, get_strategy  # noqa: E402
from otil_xdit.catalog.bundled import model_folder  # noqa: E402
from otil_xdit.xdit.plugin.sessions import session_of  # noqa: E402

STEPS = 10
CIRCLE = {"prompt": "a large red circle on the left, striped background", "height": 128, "width": 128}
WIDE = {"prompt": "a small blue square on the right, dotted background", "height": 96, "width": 160}
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "sync": ("sync", {}),
    "distrifusion": ("distrifusion", {"warmup_steps": 2}),
    "paper 1/2": ("otil-paper", {"warmup_steps": 2, "ratio": 1 / 2}),
    "paper 1/8": ("otil-paper", {"warmup_steps": 2}),
    "paper 1/8 by keys": ("otil-paper", {"warmup_steps": 2, "select": "kv-cosine"}),
    "otil": ("otil", {}),
    "high": ("otil", {"quality": "high"}),
    "naive": ("naive", {}),
}
CONFIGS = {name: get_strategy(strategy).make_config(given) for name, (strategy, given) in STRATEGIES.items()}


def main() -> None:
    otil_xdit.register()
    torch.set_num_threads(1)
    reference = latents(load(), CIRCLE)
    found = {name: measured(config, reference) for name, config in CONFIGS.items()}
    found["again"] = repeated(OtilConfig(ratio=1 / 4))
    if dist.get_rank() == dist.get_world_size() - 1:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def load() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(
        model_folder("tiny-dit"), text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parallel(config: OtilConfig) -> Any:
    pipe = otil_xdit.parallelize(load(), config=config, use_cfg_parallel="--cfg" in sys.argv)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, call: dict[str, Any]) -> torch.Tensor | None:
    """The final latents, [1, 4, h, w]; None on ranks without them."""
    generator = torch.Generator().manual_seed(3)
    output = pipe(**call, guidance_scale=4.0, num_inference_steps=STEPS, generator=generator, output_type="latent")
    return None if output is None else output.images


def measured(config: OtilConfig, reference: torch.Tensor) -> dict[str, Any]:
    pipe = parallel(config)
    made = latents(pipe, CIRCLE)
    session = session_of(pipe)
    report = session.report().to_dict()
    session.detach()
    if made is None:
        return report
    error = (made - reference).abs()
    return {**report, "max_error": error.max().item(), "mean_error": error.mean().item()}


def repeated(config: OtilConfig) -> list[str]:
    """Digests of one image, another of another size, and the first again."""
    pipe = parallel(config)
    images = [latents(pipe, call) for call in (CIRCLE, WIDE, CIRCLE)]
    session_of(pipe).detach()
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images if image is not None]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
