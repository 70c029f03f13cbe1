"""The demo: one image by one process and by several, under each strategy, and a large one that several draw faster.

It starts its ranks once, with torchrun. They load each model once and go from strategy to strategy with `parallelize`
and `restore`; rank 0 alone draws what one process draws, while the others wait. Every rank has one thread, as if it
were one GPU. A short image comes before every timed one.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import otil_xdit
from otil_xdit.catalog.bundled import model_folder
from otil_xdit.catalog.folders import OWN, load_pipe

PROMPT = "a large red circle on the left and a small blue square on the right, striped background"
STRATEGIES: dict[str, tuple[str, dict[str, Any]] | None] = {
    "one process": None,
    "sync": ("sync", {}),
    "distrifusion": ("distrifusion", {}),
    "otil-paper": ("otil-paper", {}),
    "otil": ("otil", {}),
    "otil, draft": ("otil", {"quality": "draft"}),
}
"""What is compared: a strategy and its settings."""


NOTES = """
Bytes: handed to collectives, mean over the steps after warm-up; a U-Net's output is left out.
Seconds: the whole image, one thread a rank, after a short image that is not timed."""


@dataclass(frozen=True)
class Scene:
    """Images of one model: how it samples, their side in pixels, and how often each is drawn."""

    model: str
    sampler: str
    steps: int
    size: int
    strategies: tuple[str, ...]
    rounds: int = 1
    warmup_steps: int = 3

    @property
    def title(self) -> str:
        return f"{self.model}, {self.size} x {self.size} pixels, {self.steps} steps"


SCENES = (
    Scene("tiny-sd", "dpm-solver", 20, 128, tuple(STRATEGIES)),
    Scene("tiny-dit", OWN, 28, 128, tuple(STRATEGIES)),
    # Latent 96 x 96: large enough for two ranks to be faster than one, although each also does the link's work.
    Scene("tiny-sd", "dpm-solver", 4, 384, ("one process", "otil"), rounds=3, warmup_steps=1),
)


@dataclass(frozen=True)
class Result:
    """One strategy's image, its seconds (median), and rank 0's report (None on one process)."""

    name: str
    image: Image.Image
    seconds: float
    report: otil_xdit.Report | None


def main() -> None:
    """Start the ranks, or be one of them."""
    arguments = parse_arguments()
    if "RANK" in os.environ:
        run_rank(arguments)
        return
    started = time.perf_counter()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}"]
    done = subprocess.run([*torchrun, __file__, *sys.argv[1:]], env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(f"{time.perf_counter() - started:.0f} seconds in all, loading included")
    sys.exit(done.returncode)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2, help="patches, for every strategy")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo.png"))
    return parser.parse_args()


def run_rank(arguments: argparse.Namespace) -> None:
    """Draw everything; rank 0 shows the progress, prints the tables and writes the sheet."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    logging.disable(logging.WARNING)  # what xDiT notes at every start would drown the progress bar
    dist.init_process_group()
    images = sum(len(scene.strategies) * (1 + scene.rounds) for scene in SCENES)
    with tqdm(total=images, unit="image", disable=dist.get_rank() > 0) as bar:
        results = [draw_scene(scene, arguments, bar) for scene in SCENES]
    if dist.get_rank() == 0:
        print(f'\n"{arguments.prompt}", seed {arguments.seed}')
        for scene, drawn in zip(SCENES, results, strict=True):
            print(f"\n{table(scene, drawn)}")
        print(NOTES)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        make_sheet(results).save(arguments.output)
        print(f"Images side by side: {arguments.output}")
    dist.barrier()
    dist.destroy_process_group()


def draw_scene(scene: Scene, arguments: argparse.Namespace, bar: tqdm) -> list[Result]:
    """Draw a scene's images, the strategies taking turns in every round."""
    pipe = load_pipe(model_folder(scene.model), scene.sampler, None)
    drawn: dict[str, list[Result]] = {name: [] for name in scene.strategies}
    for turn, name in product(range(-1, scene.rounds), scene.strategies):
        bar.set_description(f"{scene.model} {scene.size}, {name}")
        one = draw(pipe, name, scene, scene.warmup_steps if turn < 0 else scene.steps, arguments)
        drawn[name] += [one] * (turn >= 0)
        bar.update()
    return [replace(images[-1], seconds=median(one.seconds for one in images)) for images in drawn.values()]


def draw(pipe: Any, name: str, scene: Scene, steps: int, arguments: argparse.Namespace) -> Result:
    """Draw one image on all ranks, or on rank 0 alone; every rank gets it, and the same seconds."""
    choice, images, seconds, report = STRATEGIES[name], None, 0.0, None
    if choice is not None:
        config = otil_xdit.get_strategy(choice[0]).make_config(choice[1])
        pipe = otil_xdit.parallelize(pipe, choice[0], config)
    dist.barrier()  # all begin together, and none while another still draws
    if choice is not None or dist.get_rank() == 0:
        started = time.perf_counter()
        settings = {"height": scene.size, "width": scene.size, "num_inference_steps": steps, "guidance_scale": 4.0}
        output = pipe(arguments.prompt, **settings, generator=torch.Generator().manual_seed(arguments.seed))
        images, seconds = output and output.images, time.perf_counter() - started
    if choice is not None:
        report = otil_xdit.report(pipe)
        otil_xdit.restore(pipe)
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (images, seconds))
    image = next(images for images, _ in reversed(answers) if images)[0]  # xDiT leaves a DiT's on the last rank
    return Result(name, image, max(seconds for _, seconds in answers), report)


def psnr(image: Image.Image, reference: Image.Image) -> str:
    """Return the peak signal-to-noise ratio of two 8-bit images, in words."""
    error = np.square(np.asarray(image, np.float64) - np.asarray(reference, np.float64)).mean()
    return f"{10 * math.log10(255**2 / error):.1f} dB" if error else "identical"


def table(scene: Scene, results: list[Result]) -> str:
    """Return a scene's table; PSNR and speed are against its first result."""
    lines = [
        scene.title,
        f"{'':>14} |       | kB sent per step and rank    | PSNR to one |         | times",
        f"{'':>14} | ranks | keys, values | halo, moments | process     | seconds | as fast",
        f"{'-' * 15}|-------|--------------|---------------|-------------|---------|--------",
    ]
    for result in results:
        ranks = dist.get_world_size() if result.report else 1
        sent = (result.report.kv_bytes_per_step, result.report.small_bytes_per_step) if result.report else (0, 0)
        near = psnr(result.image, results[0].image)
        lines.append(
            f"{result.name:>14} | {ranks:>5} | {sent[0] / 1e3:>12.1f} | {sent[1] / 1e3:>13.1f} | {near:>11} "
            f"| {result.seconds:>7.2f} | {results[0].seconds / result.seconds:>7.2f}"
        )
    return "\n".join(lines)


def make_sheet(rows: list[list[Result]], side: int = 256) -> Image.Image:
    """Lay out a row of images for each of `SCENES`: its title, its images' names, and the images at one size.

    Args:
        rows: the results of each scene.
        side: pixels a side of every image on the sheet.
    """
    margin, line = 8, 22
    cell, height = side + margin, 2 * line + side + margin
    page = Image.new("RGB", (max(map(len, rows)) * cell + margin, len(rows) * height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    for row, (scene, results) in enumerate(zip(SCENES, rows, strict=True)):
        top = row * height
        pen.text((margin, top + 3), scene.title, "black", font, stroke_width=0.4)
        for column, result in enumerate(results):
            left = margin + column * cell
            near = f", {psnr(result.image, results[0].image)}" if column else ""
            pen.text((left, top + line + 1), f"{result.name}{near}", "black", font)
            page.paste(result.image.resize((side, side)), (left, top + 2 * line))
    return page


if __name__ == "__main__":
    main()
