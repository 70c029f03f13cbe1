"""Accuracy of a pipeline folder that draws clips: fresh captions, and the analytic reader of moving_scenes.py.

A clip is `right` if something of the named colour goes the named way and is of the named shape. Captions come from a
seed that no training script uses.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from moving_scenes import FRAMES, SIDE, Motion, read, sample, strip
from scenes import contact_sheet
from tqdm import tqdm


def generate(pipeline: WanPipeline, motions: list[Motion], args: argparse.Namespace) -> np.ndarray:
    """Clips uint8 (n, FRAMES, SIDE, SIDE, 3), batch by batch, noise from `args.seed`."""
    draw, parts = torch.Generator().manual_seed(args.seed), []
    for begin in tqdm(range(0, len(motions), args.batch)):
        output = pipeline(
            [motion.caption() for motion in motions[begin : begin + args.batch]],
            height=SIDE,
            width=SIDE,
            num_frames=FRAMES,
            num_inference_steps=args.steps,
            guidance_scale=args.cfg,
            generator=draw,
            output_type="np",
        )
        parts.append((output.frames * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="pipeline folder, say otil_xdit/weights/tiny-video")
    parser.add_argument("--count", type=int, default=40, help="clips")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet of 16 clips here")
    args = parser.parse_args()
    pipeline = WanPipeline.from_pretrained(args.folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(args.seed)
    motions = [sample(rng) for _ in range(args.count)]
    clips = generate(pipeline, motions, args)
    results = [read(clip, motion) for clip, motion in zip(clips, motions, strict=True)]
    if args.sheet:
        shown = np.stack([strip(clip) for clip in clips[:16]])
        contact_sheet(shown, [motion.caption() for motion in motions[:16]], columns=1).save(args.sheet)
    shares = {claim: float(np.mean([result[claim] for result in results])) for claim in results[0]}
    print(json.dumps({"folder": str(args.folder), "steps": args.steps, "clips": args.count, **shares}))


if __name__ == "__main__":
    main()
