"""How much of the ideal factor 2 a U-Net keeps on two ranks of a CPU, and where the rest goes.

    torchrun --nproc_per_node 2 examples/cpu_ratio.py [--rounds 5] [--models narrow wide]

Each rank has one thread and one core to itself. In every round, one process (rank 0, while the other sleeps) and each
strategy take turns, so that a machine that slows down slows all of them. The network has random weights: SD1.5's
topology in tiny-sd's width, and five times as wide. Printed are the time of a step after warm-up, the median of the
rounds, and what rank 0 spent it on (by timers round torch's functions, in a run of its own): Markdown tables, then a
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.overrides import TorchFunctionMode

import otil_xdit
from otil_xdit.registry import get_strategy
from otil_xdit.xdit.hooks import session_of

MODELS = {"narrow": 1, "wide": 5}
"""Times the width of tiny-sd."""
STRATEGIES = ("sync", "otil", "distrifusion", "naive")
ALONE = "one process"
SETTINGS = {"warmup_steps": 2, "fresh_share": 0.0}
"""What is timed are displaced steps, of the strategies that have them."""

SKIPPED_STEPS = 4
"""Warm-up steps, and the first displaced ones, which make their buffers."""

LATENT, TEXT_TOKENS, TEXT_WIDTH = (2, 4, 32, 32), 24, 64

PARTS = {
    "convolutions": ("conv2d",),
    "attention": ("scaled_dot_product_attention",),
    "linear layers": ("linear",),
    "norms": ("group_norm", "layer_norm", "batch_norm", "mean", "square_", "repeat_interleave"),
}
"""Parts of a step and the torch functions that they call; every other function moves or adds values."""
REST, WAITING, PYTHON = "element-wise, copies", "waiting for the other rank", "Python and dispatch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a round")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rank = int(os.environ["RANK"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    otil_xdit.register()
    from xfuser.core.distributed import init_distributed_environment

    init_distributed_environment()
    for model in arguments.models:
        pipe = build(MODELS[model])
        seconds = timed(pipe, arguments)
        if rank == 0:
            parameters = sum(parameter.numel() for parameter in pipe.unet.parameters())
            print(f"\n{model}: {parameters / 1e6:.1f} M parameters, latent {LATENT}, torch {torch.__version__}\n")
            print(times_table(seconds), flush=True)
        parts = {kind: spent(pipe, kind, arguments.steps) for kind in (ALONE, *STRATEGIES)}
        if rank == 0:
            print(f"\n{parts_table(parts)}\n")
            print(json.dumps({"model": model, "seconds": seconds, "parts": parts}), flush=True)
        dist.barrier()
    dist.destroy_process_group()


def build(times: int) -> Any:
    """A pipeline round a U-Net of SD1.5's topology, `times` as wide as tiny-sd."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=LATENT[-1],
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=tuple(times * channels for channels in (32, 48, 64, 64)),
        layers_per_block=2,
        attention_head_dim=2 if times == 1 else times,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return StableDiffusionPipeline(**nothing, unet=unet.eval(), scheduler=scheduler, requires_safety_checker=False)


def timed(pipe: Any, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step of each way to run, one entry a round."""
    found: dict[str, list[float]] = {kind: [] for kind in (ALONE, *STRATEGIES)}
    for _ in range(arguments.rounds):
        for kind, rounds in found.items():
            rounds.append(sum(steps(pipe, kind, arguments.steps)) / arguments.steps)
    return found


def steps(pipe: Any, kind: str, count: int, observer: Any = None) -> list[float]:
    """Seconds of each of `count` steps after warm-up; all ranks call this together.

    Args:
        pipe: of this rank, not attached.
        kind: `ALONE`, where only rank 0 computes, or a strategy.
        count: number of steps that count.
        observer: a context that those steps are run in.
    """
    dist.barrier()
    if kind != ALONE:
        with attached(pipe, kind) as session, session.generation(pipe):
            return denoise(pipe, count, observer, session.communicator.clock.tick)
    found = denoise(pipe, count, observer, lambda: None) if dist.get_rank() == 0 else [0.0] * count
    dist.barrier()  # gloo's ranks sleep while they wait
    return found


@contextmanager
def attached(pipe: Any, kind: str) -> Iterator[Any]:
    """The session of `pipe` while it runs with a strategy."""
    session = session_of(otil_xdit.parallelize(pipe, get_strategy(kind).make_config(SETTINGS)))
    assert session is not None
    try:
        yield session
    finally:
        session.detach()


def denoise(pipe: Any, count: int, observer: Any, tick: Any) -> list[float]:
    text = torch.randn(LATENT[0], TEXT_TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    latent = torch.randn(LATENT, generator=torch.Generator().manual_seed(2))

    def step(number: int) -> float:
        started = time.perf_counter()
        pipe.unet(latent, 900 - 20 * number, encoder_hidden_states=text)
        tick()
        return time.perf_counter() - started

    for number in range(SKIPPED_STEPS):
        step(number)
    with observer or nullcontext():
        return [step(SKIPPED_STEPS + number) for number in range(count)]


class Timers(TorchFunctionMode):
    """Adds up the seconds of every torch function that is called from Python, by part of a step."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.pipe, self.entered = pipe, False
        self.seconds: Counter[str] = Counter({part: 0.0 for part in (*PARTS, REST, WAITING)})

    def __enter__(self) -> Timers:
        self.entered = True
        self.seconds[WAITING] -= self._waited()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.seconds[WAITING] += self._waited()

    def _waited(self) -> float:
        session = session_of(self.pipe)
        return 0.0 if session is None else session.communicator.report().waited_seconds

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.perf_counter()
        out = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        part = next((part for part, names in PARTS.items() if name in names), REST)
        self.seconds[part] += time.perf_counter() - started
        return out


def spent(pipe: Any, kind: str, count: int) -> dict[str, float]:
    """Seconds a step that this rank spends on each part; the timers add their own to Python's."""
    timers = Timers(pipe)
    total = sum(steps(pipe, kind, count, timers))
    if not timers.entered:
        return {}  # this rank slept
    found = {**timers.seconds, PYTHON: total - sum(timers.seconds.values())}
    return {part: seconds / count for part, seconds in found.items()}


def times_table(seconds: dict[str, list[float]]) -> str:
    alone = median(seconds[ALONE])
    rows = ["| | ms per step (least, most) | times as fast |", "|---|---|---|"]
    for kind, rounds in seconds.items():
        milliseconds = [1e3 * value for value in (median(rounds), min(rounds), max(rounds))]
        rows.append("| {} | {:.1f} ({:.1f}, {:.1f}) | {:.2f} |".format(kind, *milliseconds, alone / median(rounds)))
    return "\n".join(rows)


def parts_table(parts: dict[str, dict[str, float]]) -> str:
    """Milliseconds of a step by part; half of one process's is the ideal."""
    rows = [f"| ms per step, profiled, rank 0 | {ALONE} | half of it | {' | '.join(STRATEGIES)} |"]
    rows.append("|---" * (len(parts) + 2) + "|")
    totals = {kind: {**found, "all": sum(found.values())} for kind, found in parts.items()}
    for part in totals[ALONE]:
        alone = totals[ALONE][part]
        others = (totals[kind][part] for kind in STRATEGIES)
        cells = " | ".join(f"{1e3 * value:.1f}" for value in (alone, alone / 2, *others))
        rows.append(f"| {part} | {cells} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
