"""Accuracy of a pipeline folder: draw fresh captioned prompts and let the analytic reader judge the images.

An image is `right` if every named shape is there in the named colour and shape at the named place, and nothing else
stands out. `size` is counted apart. Prompts come from a seed that no training script uses.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from scenes import Scene, contact_sheet, read, sample
from tqdm import tqdm

CLAIMS = ("right", "colour", "shape", "place", "size", "clean")


def generate(pipeline: DiffusionPipeline, captions: list[str], steps: int, args: argparse.Namespace) -> np.ndarray:
    """Images uint8 (n, height, width, 3), batch by batch, noise from `args.seed`."""
    draw, parts = torch.Generator().manual_seed(args.seed), []
    for begin in tqdm(range(0, len(captions), args.batch), desc=f"{steps} steps"):
        output = pipeline(
            captions[begin : begin + args.batch],
            num_inference_steps=steps,
            guidance_scale=args.cfg,
            generator=draw,
            output_type="np",
        )
        parts.append((output.images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def score(images: np.ndarray, scenes: list[Scene]) -> dict[str, dict[str, float]]:
    """The share of images for which each claim holds: over all, and over prompts of one and of two shapes."""
    results = [read(image, scene) for image, scene in zip(images, scenes, strict=True)]
    groups = {"all": (1, 2), "one shape": (1,), "two shapes": (2,)}
    table = {}
    for name, numbers in groups.items():
        chosen = [r for r, scene in zip(results, scenes, strict=True) if len(scene.things) in numbers]
        shares = {claim: round(sum(r[claim] for r in chosen) / max(len(chosen), 1), 4) for claim in CLAIMS}
        table[name] = {"prompts": len(chosen), **shares}
    return table


def print_table(steps: int, table: dict[str, dict[str, float]]) -> None:
    print(f"| {steps} steps | prompts | " + " | ".join(CLAIMS) + " |")
    print("|---" * (len(CLAIMS) + 2) + "|")
    for name, row in table.items():
        print(f"| {name} | {row['prompts']} | " + " | ".join(f"{row[claim]:.1%}" for claim in CLAIMS) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="pipeline folder, say otil_xdit/weights/tiny-dit")
    parser.add_argument("--count", type=int, default=200, help="prompts; the first half name one shape, the rest two")
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 15])
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet of 24 images here")
    args = parser.parse_args()
    empty = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers wants these said where a folder lacks them
    pipeline = DiffusionPipeline.from_pretrained(args.folder, dtype=torch.float32, **empty)
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(args.seed)
    scenes = [sample(rng, 1 if i < args.count // 2 else 2) for i in range(args.count)]
    captions, summary = [scene.caption() for scene in scenes], {}
    for steps in args.steps:
        start = time.time()
        images = generate(pipeline, captions, steps, args)
        summary[steps] = score(images, scenes)
        print_table(steps, summary[steps])
        print(f"{time.time() - start:.0f} s", flush=True)
        if args.sheet and steps == args.steps[0]:
            shown = np.linspace(0, args.count - 1, 24).astype(int)
            contact_sheet(images[shown], [captions[i] for i in shown], columns=6).save(args.sheet)
    print(json.dumps({"folder": str(args.folder), "cfg": args.cfg, "seed": args.seed, "accuracy": summary}))


if __name__ == "__main__":
    main()
