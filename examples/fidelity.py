"""How close each strategy's pictures are to one process's: PSNR and SSIM over prompts and seeds, at counted bytes.

    torchrun --nproc_per_node 2 examples/fidelity.py --steps 15 30

Every rank makes all pictures together; the last one, which has them, also makes the references with plain diffusers and
prints a Markdown table and one JSON line per row. Pictures are compared as floats in 0..1.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from diffusers import StableDiffusion3Pipeline
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

import otil_xdit
from otil_xdit.config import OtilConfig
from otil_xdit.registry import get_strategy
from otil_xdit.session import PatchSession
from otil_xdit.xdit.hooks import session_of
from otil_xdit.xdit.models import model_folder

PROMPTS = (
    "a large red circle on the left and a small blue square on the right, striped background",
    "a small yellow triangle at the top and a large purple ring at the bottom, dotted background",
    "a large green square in the center, checkered background",
    "a small cyan ring on the right, smooth background",
    "a large blue triangle at the bottom, striped background",
    "a small purple circle on the left, checkered background",
    "a large cyan triangle on the right and a large yellow circle on the left, smooth background",
    "a small red square at the bottom and a large green circle at the top, checkered background",
)


@dataclass(frozen=True)
class Row:
    """Means over all pictures of one strategy, and its worst; psnr in dB, kilobytes per step and rank."""

    name: str
    ranks: int
    steps: int
    warmup_steps: int
    kv_kilobytes: float
    psnr: float
    psnr_min: float
    ssim: float
    pictures: int


def main() -> None:
    arguments = parse_arguments()
    otil_xdit.register()
    torch.set_num_threads(1)
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    if is_last:
        print("| strategy | steps | kB per step and rank | PSNR (min) | SSIM |\n|---|---|---|---|---|")
    for steps in arguments.steps:
        references = list(pictures(load(), arguments.seeds, steps)) if is_last else []
        for name, config in variants(arguments).items():
            row = measure(name, config, steps, references, arguments.seeds)
            if row is not None:
                print(f"| {row.name} | {row.steps} | {row.kv_kilobytes:.1f} | {row.psnr:.1f} ({row.psnr_min:.1f}) | "
                      f"{row.ssim:.4f} |\n<!-- {json.dumps(asdict(row))} -->", flush=True)  # fmt: skip
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[15, 30])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=OtilConfig.warmup_steps)
    parser.add_argument("--selectors", action="store_true", help="compare the selectors at 1/8 instead")
    return parser.parse_args()


def variants(arguments: argparse.Namespace) -> dict[str, OtilConfig]:
    given = {"warmup_steps": arguments.warmup}
    if arguments.selectors:
        kinds = {
            f"{select}, polling {polling:g}": {"select": select, "polling": polling}
            for select in ("latent-cosine", "kv-cosine", "kv-l2", "random")
            for polling in (0.0, 0.5, 1.0)
        }
        return {f"1/8, {name}": OtilConfig(ratio=1 / 8, **given, **kind) for name, kind in kinds.items()}
    presets = {
        "naive": ("naive", given),
        "otil 1/8": ("otil", {**given, "ratio": 1 / 8}),
        "otil 1/4": ("otil", {**given, "ratio": 1 / 4}),
        "otil 1/2": ("otil", {**given, "ratio": 1 / 2}),
        "distrifusion": ("distrifusion", given),
        "sync": ("sync", {}),
    }
    return {name: get_strategy(strategy).make_config(settings) for name, (strategy, settings) in presets.items()}


def load() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(
        model_folder("tiny-dit"), text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe: StableDiffusion3Pipeline, seeds: int, steps: int) -> Iterator[torch.Tensor | None]:
    """One [1, 3, H, W] in 0..1 for every prompt and seed, None on ranks without the picture."""
    for prompt in PROMPTS:
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            output = pipe(
                prompt,
                height=128,
                width=128,
                num_inference_steps=steps,
                guidance_scale=4.0,
                generator=generator,
                output_type="pt",
            )
            yield None if output is None else output.images


def measure(name: str, config: OtilConfig, steps: int, references: list[torch.Tensor], seeds: int) -> Row | None:
    """Make all pictures with one strategy; the row on the rank that has them."""
    pipe = otil_xdit.parallelize(load(), config)
    pipe.set_progress_bar_config(disable=True)
    made = list(pictures(pipe, seeds, steps))
    session = session_of(pipe)
    assert isinstance(session, PatchSession)
    report = session.communicator.report()
    session.detach()
    if not references:
        return None
    pairs = list(zip(made, references, strict=True))
    ratios = [peak_signal_noise_ratio(image, best, data_range=1.0).item() for image, best in pairs]
    likeness = [structural_similarity_index_measure(image, best, data_range=1.0).item() for image, best in pairs]
    return Row(
        name=name,
        ranks=dist.get_world_size(),
        steps=steps,
        warmup_steps=report.warmup_steps,
        kv_kilobytes=report.kv_bytes_per_step / 1e3,
        psnr=sum(ratios) / len(ratios),
        psnr_min=min(ratios),
        ssim=sum(likeness) / len(likeness),
        pictures=len(pairs),
    )


if __name__ == "__main__":
    main()
