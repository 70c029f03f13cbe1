"""Hybridiff's window on the shipped models: where it lies, what it costs in decibels, what it saves in FLOPs.

    torchrun --standalone --nproc_per_node 2 examples/hybridiff.py --models tiny-sd tiny-dit --steps 30 50 --out window

Rank 0 writes ``table.md``, ``figures.json`` and ``curve.png`` (the denoising discrepancy of an image, step by step) to
the folder. PSNR and SSIM are means over images, against one process's of the same seed. Bytes and FLOPs are rank 0's,
of the first image: bytes as handed to collectives, FLOPs of the denoising network by torch's FlopCounterMode.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import otil_xdit
from otil_xdit.catalog.bundled import model_folder
from otil_xdit.catalog.folders import OWN, load_pipe
from otil_xdit.hybridiff.tracing import CPU_ATTENTION
from otil_xdit.tools.common.variants import parse_variant
from otil_xdit.tools.eval.matrix import make_calls, read_prompts
from otil_xdit.tools.eval.metrics import psnr, ssim
from otil_xdit.xdit.plugin.sessions import session_of

VARIANTS = (*(f"hybridiff:window_steps={steps}" for steps in (0, 3, 5, 10, 20)), "otil", "distrifusion")
GUIDANCE, SIZE = 4.0, 128
TEXTS = ("model", "steps", "ranks", "strategy", "window")
FIGURES = ("PSNR, dB", "SSIM", "kB a rank", "GFLOPs a rank", "of one process")

Image = tuple[str, int]
"""Prompt and seed."""


def main() -> None:
    """Make every row of the table."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["tiny-sd", "tiny-sdxl", "tiny-dit"], metavar="MODEL")
    parser.add_argument("--steps", nargs="+", type=int, default=[30, 50], metavar="N")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="PRESET[:SETTING=VALUE,...]")
    parser.add_argument("--prompts", type=int, default=2, metavar="N")
    parser.add_argument("--seeds", type=int, default=2, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("window"), metavar="FOLDER")
    given = parser.parse_args()
    for variant in given.variants:
        parse_variant(variant)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    otil_xdit.register()
    calls = make_calls(read_prompts(), given.prompts, given.seeds)
    images = [(call.prompt, call.seed) for call in calls]
    rows = []
    for model in given.models:
        for steps in given.steps:
            for row in rows_of(model, steps, given.variants, images):
                rows.append(row)
                if dist.get_rank() == 0:
                    print(line(row), flush=True)
    if dist.get_rank() == 0:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "figures.json").write_text(json.dumps(rows, indent=1) + "\n")
        (given.out / "table.md").write_text("\n".join((head(), *map(line, rows))) + "\n")
        plot(rows, given.out / "curve.png")
    dist.barrier()
    dist.destroy_process_group()


def rows_of(model: str, steps: int, variants: list[str], images: list[Image]) -> Iterator[dict[str, Any]]:
    """The rows of one model and number of steps, of this rank."""
    alone = load_pipe(model_folder(model), OWN, None)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        references = [made(alone, drawn, steps) for drawn in images[:1]]
    whole = network_flops(counter, alone)
    references += [made(alone, drawn, steps) for drawn in images[1:]]
    for text in variants:
        pipe = parallel(model, text)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            images = [made(pipe, images[0], steps)]
        report = session_of(pipe).report().to_dict()
        flops = network_flops(counter, pipe)
        images += [made(pipe, drawn, steps) for drawn in images[1:]]
        session_of(pipe).detach()
        pairs = [(image, reference) for image, reference in zip(images, references, strict=True) if image is not None]
        scores: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(scores, [(psnr(*pair), ssim(*pair)) for pair in pairs])
        known = next(score for score in scores if score)
        yield {
            "model": model,
            "steps": steps,
            "ranks": dist.get_world_size(),
            "variant": text,
            "psnr": mean(score[0] for score in known),
            "ssim": mean(score[1] for score in known),
            "flops": flops,
            "share": flops / whole,
            "report": report,
        }


def parallel(model: str, text: str) -> Any:
    from xfuser.core.distributed.parallel_state import destroy_model_parallel, model_parallel_is_initialized

    gc.collect()
    if model_parallel_is_initialized():
        destroy_model_parallel()  # the last one's may be of other degrees, and xDiT makes none while it has some
    variant = parse_variant(text)
    pipe = otil_xdit.parallelize(load_pipe(model_folder(model), OWN, None), variant.preset, variant.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(pipe: Any, drawn: Image, steps: int) -> torch.Tensor | None:
    """float32 [3, H, W] in 0..1; None on a rank without it."""
    prompt, seed = drawn
    output = pipe(
        prompt,
        height=SIZE,
        width=SIZE,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    )
    return None if output is None else output.images[0].float()


def network_flops(counter: FlopCounterMode, pipe: Any) -> int:
    """What of the counted is the denoising network's."""
    network = getattr(pipe, "unet", None)
    network = pipe.transformer if network is None else network
    return sum(counter.get_flop_counts()[type(network).__name__].values())


def head() -> str:
    return f"| {' | '.join((*TEXTS, *FIGURES))} |\n|{'---|' * len(TEXTS)}{'---:|' * len(FIGURES)}"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    report = row["report"]
    sent = sum(sum(sent.values()) for kind, sent in report["sent_bytes"].items() if kind != "random-state")
    window = "" if report["window"] is None else "{} to {}".format(*report["window"])
    cells = (
        row["model"],
        row["steps"],
        row["ranks"],
        row["variant"],
        window,
        f"{row['psnr']:.1f}",
        f"{row['ssim']:.4f}",
    )
    return f"| {' | '.join(map(str, cells))} | {sent / 1e3:.0f} | {row['flops'] / 1e9:.1f} | {row['share']:.0%} |"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The curves of the first variant of each model and number of steps, with where its window would begin."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    found = {(row["model"], row["steps"]): row["report"] for row in reversed(rows)}
    for (model, steps), report in sorted(found.items()):
        shares = [step / steps for step in range(steps)]
        (drawn,) = axes.plot(shares, report["discrepancy"], label=f"{model}, {steps} steps")
        if report["window"] is not None:
            axes.axvline(report["window"][0] / steps, color=drawn.get_color(), linestyle=":")
    axes.set(xlabel="share of the steps; dotted: tau_1", ylabel="denoising discrepancy", yscale="log")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
