"""What a LoRA of lora.py changes: its loss on scenes with and without golden rims, and the images that it draws.

Scenes and prompts come from a seed that no training script uses and have nothing yellow. The loss is that of training,
with the same noise at the same levels for every row of the table. In drawn images, `gold` is the share of the pixels
round the shapes (as the reader of scenes.py sees them, by hue) that are yellow; `drawn` is the share of images in
which every named shape is there in its colour, at its place.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from check import generate
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from lora import encode, gild, load_base
from PIL import Image, ImageFilter
from scenes import Scene, colour_masks, draw, read, sample
from tiny_unet import SCHEDULE, embed

LEVELS = 10
"""Noise levels at which each scene's loss is taken."""
NEAR = 4
"""Pixels round a shape that a rim should cover."""


@torch.no_grad()
def loss(pipeline: StableDiffusionPipeline, images: np.ndarray, captions: list[str]) -> float:
    """Mean min-SNR loss (gamma = 5) of noise prediction."""
    latents, words = encode(pipeline, images), embed(pipeline, "sd", captions)["words"]
    draw_noise, found = torch.Generator().manual_seed(1), []
    for step in (torch.arange(LEVELS) * 1000 + 500) // LEVELS:
        alpha = DDIMScheduler(**SCHEDULE).alphas_cumprod[step]
        noise = torch.randn(latents.shape, generator=draw_noise)
        output = pipeline.unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, step, words).sample
        found.append((5 * (1 - alpha) / alpha).clamp(max=1) * (output - noise).square().mean())
    return float(torch.stack(found).mean())


def gold(image: np.ndarray, scene: Scene) -> float:
    """Share of yellow among the pixels at most `NEAR` from a pixel of a named colour that are of none of them."""
    masks = colour_masks(image)
    shape = np.any([masks[thing.colour] for thing in scene.things], axis=0)
    grown = Image.fromarray(shape.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * NEAR + 1))
    rim = (np.asarray(grown) > 0) & ~shape
    return float(masks["yellow"][rim].mean()) if rim.any() else 0.0


def row(pipeline: StableDiffusionPipeline, scenes: list[Scene], args: argparse.Namespace) -> tuple[dict, np.ndarray]:
    """One row of the table, and the images that it is about."""
    captions, rng = [scene.caption() for scene in scenes], np.random.default_rng(args.seed)
    plain = np.stack([draw(scene, rng) for scene in scenes])
    made = generate(pipeline, captions, args.steps, args)
    seen = [read(image, scene) for image, scene in zip(made, scenes, strict=True)]
    figures = {
        "loss, rims": loss(pipeline, gild(plain), captions),
        "loss, no rims": loss(pipeline, plain, captions),
        "gold": float(np.mean([gold(image, scene) for image, scene in zip(made, scenes, strict=True)])),
        "drawn": float(np.mean([one["colour"] and one["place"] for one in seen])),
    }
    return figures, made


def without_yellow(rng: np.random.Generator, count: int) -> list[Scene]:
    found: list[Scene] = []
    while len(found) < count:
        scene = sample(rng)
        if all(thing.colour != "yellow" for thing in scene.things):
            found.append(scene)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with pytorch_lora_weights.safetensors")
    parser.add_argument("--count", type=int, default=40, help="scenes and prompts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--seed", type=int, default=54321)
    parser.add_argument("--strip", type=Path, help="write the first images here: above without, below with the LoRA")
    args = parser.parse_args()
    rng, pipeline, table, strips = np.random.default_rng(args.seed), load_base(), {}, []
    pipeline.unet.set_attn_processor(AttnProcessor())  # sooner on a CPU too, see tiny_unet.py
    scenes = without_yellow(rng, args.count)
    for name in ("tiny-sd", "with the LoRA"):
        if strips:
            pipeline.load_lora_weights(args.folder)
            pipeline.fuse_lora()  # the same images, sooner
        table[name], made = row(pipeline, scenes, args)
        strips.append(np.concatenate(list(made[:5]), axis=1))
    print("| | " + " | ".join(table["tiny-sd"]) + " |\n|---|---|---|---|---|")
    for name, figures in table.items():
        rims, no_rims, golden, drawn = figures.values()
        print(f"| {name} | {rims:.4f} | {no_rims:.4f} | {golden:.1%} | {drawn:.1%} |")
    print(json.dumps({"folder": str(args.folder), "prompts": args.count, "steps": args.steps, "table": table}))
    if args.strip:
        Image.fromarray(np.concatenate(strips)).save(args.strip)


if __name__ == "__main__":
    main()
