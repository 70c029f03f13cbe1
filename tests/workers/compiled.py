"""What compiled networks compute on the ranks of a torchrun, and in how many graphs; prints one JSON object a case.

torchrun --standalone --nproc_per_node 2 tests/workers/compiled.py [CASE ...]

A case is MODEL/STRATEGY/HOW/BACKEND: a small U-Net of SD1.5's topology (`unet`) or the shipped tiny-dit (`dit`), a
strategy or `xdit` (tiny-dit on two Ulysses ranks of xDiT without a strategy; in a run of its own, as xDiT makes its
groups once), `module`, `inplace` or `blocks`, and a backend of torch.compile. Compiled with ``fullgraph=True`` for a
U-Net. Each object holds `graphs`, made while the first image was drawn, and `later`, while the second was; `breaks`
of a graph by reason; and the largest difference from one process (`exact`) and from the same without compiling
(`plain`), over the deviation.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit.catalog.bundled import model_folder  # noqa: E402
from tests.support.unets.configs import build_unet  # noqa: E402
from tests.support.unets.pipelines import pipeline_around  # noqa: E402

CASES = (
    *(f"unet/{name}/module/eager" for name in ("sync", "naive", "distrifusion", "otil", "otil-paper", "compact-2bit")),
    "unet/otil/inplace/eager",
    "unet/otil/blocks/eager",
    "unet/otil/module/aot_eager",
    "dit/sync/module/eager",
    "dit/otil/module/eager",
    "dit/otil/inplace/eager",
    "dit/otil/blocks/eager",
    "unet/sync/module/inductor",
    "unet/otil/module/inductor",
    "dit/otil/module/inductor",
)
STEPS = 10


def main() -> None:
    warnings.filterwarnings("ignore")
    otil_xdit.register()
    torch.set_num_threads(1)
    for case in sys.argv[1:] or CASES:
        started = time.perf_counter()
        try:
            found = made(*case.split("/"))
        except Exception as error:  # the next case may do
            found = {"error": f"{type(error).__name__}: {error}"[:1500]}
        if dist.get_rank() == 0:
            seconds = round(time.perf_counter() - started, 1)
            print(json.dumps({"case": case, **found, "seconds": seconds}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def load(model: str) -> Any:
    if model == "unet":
        pipe = pipeline_around(build_unet("sd1.5"))
    else:
        from diffusers import StableDiffusion3Pipeline

        folder = model_folder("tiny-dit")
        absent = {"text_encoder_3": None, "tokenizer_3": None}
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any) -> torch.Tensor:
    """Latents of an image; every rank gets them, but of xDiT's wrappers the last alone."""
    draw = torch.Generator().manual_seed(7)
    call: dict[str, Any] = {"generator": draw, "num_inference_steps": STEPS, "guidance_scale": 4.0}
    if hasattr(pipe, "unet"):
        words = torch.randn(2, 1, 7, pipe.unet.config.cross_attention_dim, generator=draw)
        call |= {"prompt_embeds": words[0], "negative_prompt_embeds": words[1], "height": 192, "width": 128}
    else:
        call |= {"prompt": "a large red circle on the left", "height": 128, "width": 128}
    output = pipe(**call, output_type="latent")
    return torch.zeros(1) if output is None else output.images


def on_ranks(pipe: Any, strategy: str) -> Any:
    if strategy != "xdit":
        return otil_xdit.parallelize(pipe, strategy)
    from xfuser import xFuserArgs, xFuserStableDiffusion3Pipeline

    engine_config, _ = xFuserArgs(model="tiny-dit", ulysses_degree=2).create_config()
    engine_config.runtime_config.dtype = torch.float32
    return xFuserStableDiffusion3Pipeline(pipe, engine_config)


def compile_network(pipe: Any, name: str, how: str, backend: str) -> None:
    network: nn.Module = getattr(pipe, name)
    options: dict[str, Any] = {"backend": backend, "fullgraph": name == "unet"}
    if how == "module":
        setattr(pipe, name, torch.compile(network, **options))
    elif how == "inplace":
        network.compile(**options)
    elif name == "unet":
        network.compile_repeated_blocks(**options)
    else:  # diffusers does not say which blocks of SD3 are alike
        for block in network.transformer_blocks:
            block.compile(**options)


def made(model: str, strategy: str, how: str, backend: str) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    pipe = load(model)
    exact = image(pipe)
    pipe = on_ranks(pipe, strategy)
    plain = image(pipe)
    torch._dynamo.reset()
    counters.clear()
    compile_network(pipe, "unet" if model == "unet" else "transformer", how, backend)
    first = image(pipe)
    graphs = counters["stats"]["unique_graphs"]
    second = image(pipe)
    found = {
        "graphs": graphs,
        "later": counters["stats"]["unique_graphs"] - graphs,
        "breaks": {reason.strip().partition("\n")[0][:90]: count for reason, count in counters["graph_break"].items()},
        "exact": difference(first, exact),
        "plain": difference(first, plain),
        "repeated": difference(second, first),
    }
    if strategy != "xdit":
        otil_xdit.restore(pipe)
        if model == "unet":
            found["restored"] = difference(image(pipe), exact)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    return ranks[-1]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest, over the deviation; 0 where this rank has no image."""
    if one.shape != other.shape:
        return 0.0
    return ((one - other).abs().max() / other.std().clamp_min(1e-9)).item()


if __name__ == "__main__":
    main()
