"""How close each strategy's pictures are to one process's: PSNR and SSIM over prompts and seeds, at counted bytes.

    torchrun --nproc_per_node 2 examples/fidelity.py --steps 15 30
    torchrun --nproc_per_node 4 examples/fidelity.py --model tiny-sd --scheduler dpm-solver unipc euler --steps 15

The references, made with plain diffusers, are shared out over the ranks; then all ranks make each picture together. The
last rank prints a Markdown table and one JSON line per row. Pictures are compared as floats in 0..1.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

import otil_xdit
from otil_xdit.config import OtilConfig
from otil_xdit.registry import get_strategy
from otil_xdit.run import Report
from otil_xdit.xdit.hooks import session_of
from otil_xdit.xdit.schedulers import SCHEDULERS, make_scheduler
from otil_xdit.xdit.shipped import model_folder

PROMPTS = (Path(__file__).parent / "prompts.txt").read_text().splitlines()
HEADER = """\
| strategy | ranks | scheduler, steps | kB of K/V | kB of halo, moments | PSNR (min) | SSIM |
|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Row:
    """Means over all pictures of one strategy, and its worst; psnr in dB, kilobytes per step and rank."""

    model: str
    name: str
    ranks: int
    scheduler: str
    steps: int
    warmup_steps: int
    kv_kilobytes: float
    small_kilobytes: float
    psnr: float
    psnr_min: float
    ssim: float
    pictures: int

    def __str__(self) -> str:
        return (
            f"| {self.name} | {self.ranks} | {self.scheduler}, {self.steps} | {self.kv_kilobytes:.1f} | "
            f"{self.small_kilobytes:.1f} | {self.psnr:.1f} ({self.psnr_min:.1f}) | {self.ssim:.4f} |"
        )


def main() -> None:
    arguments = parse_arguments()
    otil_xdit.register()
    torch.set_num_threads(1)
    # The ranks of a torchrun that are ready wait here for the others; xDiT makes its own groups later.
    dist.init_process_group("gloo")
    is_last = dist.get_rank() == dist.get_world_size() - 1
    if is_last:
        print(HEADER, flush=True)
    for scheduler in arguments.scheduler:
        for steps in arguments.steps:
            references = shared_references(arguments, scheduler, steps)
            for name, config in variants(arguments).items():
                made, report = generate(arguments, scheduler, steps, config)
                if is_last:
                    row = compare(arguments.model, name, scheduler, steps, report, made, references)
                    print(f"{row}\n<!-- {json.dumps(asdict(row))} -->", flush=True)
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-dit", help="a model that ships with otil-xdit")
    parser.add_argument("--scheduler", nargs="+", choices=["own", *SCHEDULERS], default=["own"], help="U-Nets only")
    parser.add_argument("--steps", type=int, nargs="+", default=[15, 30])
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=OtilConfig.warmup_steps)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--selectors", action="store_true", help="compare the selectors at 1/8 instead")
    which.add_argument("--small", action="store_true", help="compare fresh and displaced halo and moments instead")
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
    if arguments.small:
        return {
            f"ratio {name}, halo {halo}, moments {moments}": OtilConfig(
                ratio=ratio, halo=halo, moments=moments, **given
            )
            for name, ratio in (("1/8", 1 / 8), ("1", 1.0))
            for halo in ("displaced", "fresh")
            for moments in ("displaced", "fresh")
        }
    presets = {
        "naive": ("naive", given),
        "otil 1/8": ("otil", {**given, "ratio": 1 / 8}),
        "otil 1/4": ("otil", {**given, "ratio": 1 / 4}),
        "otil 1/2": ("otil", {**given, "ratio": 1 / 2}),
        "distrifusion": ("distrifusion", given),
        "sync": ("sync", {}),
    }
    return {name: get_strategy(strategy).make_config(settings) for name, (strategy, settings) in presets.items()}


def load(model: str, scheduler: str) -> Any:
    # diffusers wants to be told that tiny-dit has no third text encoder; to other pipelines this says nothing.
    absent = {"text_encoder_3": None, "tokenizer_3": None} if model == "tiny-dit" else {}
    pipe = DiffusionPipeline.from_pretrained(model_folder(model), torch_dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    if scheduler != "own":
        pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
    return pipe


def calls(arguments: argparse.Namespace) -> list[tuple[str, int]]:
    """Prompt and seed of every picture."""
    return [(prompt, seed) for prompt in PROMPTS[: arguments.prompts] for seed in range(arguments.seeds)]


def picture(pipe: Any, prompt: str, seed: int, steps: int) -> torch.Tensor | None:
    """[1, 3, H, W] in 0..1; None on a rank without it."""
    output = pipe(
        prompt,
        height=128,
        width=128,
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    )
    return None if output is None else output.images


def shared_references(arguments: argparse.Namespace, scheduler: str, steps: int) -> list[torch.Tensor]:
    """The pictures of plain diffusers; each rank makes its share and gets the others'."""
    pipe, ranks = load(arguments.model, scheduler), dist.get_world_size()
    mine = [picture(pipe, *call, steps) for call in calls(arguments)[dist.get_rank() :: ranks]]
    shares: list[Any] = [None] * ranks
    dist.all_gather_object(shares, mine)
    return [shares[index % ranks][index // ranks] for index in range(len(calls(arguments)))]


def generate(
    arguments: argparse.Namespace, scheduler: str, steps: int, config: OtilConfig
) -> tuple[list[torch.Tensor | None], Report]:
    """All pictures by all ranks, and this rank's counters of the last."""
    pipe = otil_xdit.parallelize(load(arguments.model, scheduler), config)
    pipe.set_progress_bar_config(disable=True)
    made = [picture(pipe, *call, steps) for call in calls(arguments)]
    session = session_of(pipe)
    assert session is not None
    report = session.communicator.report()
    session.detach()
    return made, report


def compare(
    model: str,
    name: str,
    scheduler: str,
    steps: int,
    report: Report,
    made: list[torch.Tensor | None],
    references: list[torch.Tensor],
) -> Row:
    pairs = list(zip(made, references, strict=True))
    ratios = [peak_signal_noise_ratio(image, best, data_range=1.0).item() for image, best in pairs]
    likeness = [structural_similarity_index_measure(image, best, data_range=1.0).item() for image, best in pairs]
    return Row(
        model=model,
        name=name,
        ranks=int(os.environ["WORLD_SIZE"]),
        scheduler=scheduler,
        steps=steps,
        warmup_steps=report.warmup_steps,
        kv_kilobytes=report.kv_bytes_per_step / 1e3,
        small_kilobytes=report.small_bytes_per_step / 1e3,
        psnr=sum(ratios) / len(ratios),
        psnr_min=min(ratios),
        ssim=sum(likeness) / len(likeness),
        pictures=len(pairs),
    )


if __name__ == "__main__":
    main()
