"""Draws with a small U-Net on two gloo ranks with kernels, in Triton's interpreter, and without.

    TRITON_INTERPRET=1 torchrun --nproc_per_node 2 tests/workers/fused_unet.py sync displaced

Rank 0 prints a JSON object for each case: on every rank the error of the latents relative to their largest number, and
how many maps norms have activated where their convolutions read them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit import OtilConfig, get_strategy  # noqa: E402
from otil_xdit.method.kernels import fused_on, group_norm  # noqa: E402
from otil_xdit.xdit.plugin.sessions import session_of  # noqa: E402
from tests.support.unets.pipelines import pipeline_around  # noqa: E402

PIXELS, ROWS, COLS, STEPS = 8, 16, 8, 4

SYNC = get_strategy("sync").make_config({})
CASES: dict[str, OtilConfig] = {
    "sync": SYNC,
    "displaced": OtilConfig(fresh_share=0.0),
    "waiting": OtilConfig(fresh_share=1.0),
    "frozen": get_strategy("naive").make_config({}),
    "channels last": OtilConfig(fresh_share=0.0),
    "LoRA": SYNC,
    "hooked": SYNC,
    "in between": SYNC,
    "all hooked": SYNC,
}


def main() -> None:
    otil_xdit.register()
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        ways = [drawn(name, way) for way in ("eager", "kernels")]
        (expected, none), (found, activated) = ways
        error = float((found - expected).abs().max() / expected.abs().max())
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, {"error": error, "without": none, "activated": activated})
        if dist.get_rank() == 0:
            print(json.dumps({"case": name, "ranks": ranks}), flush=True)
    dist.destroy_process_group()


def network() -> UNet2DConditionModel:
    """No attention, whose kernels take the interpreter long."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
    )


def drawn(name: str, way: str) -> tuple[torch.Tensor, int]:
    """Latents, [1, 4, ROWS, COLS], and the number of maps that norms have activated."""
    unet = network()
    if name == "LoRA":
        unet.add_adapter(LoraConfig(r=2, target_modules=["conv1", "conv2"], init_lora_weights=False))
    if name == "channels last":
        unet.to(memory_format=torch.channels_last)
    blocks = [module for module in unet.modules() if hasattr(module, "nonlinearity")]
    if name == "hooked":
        blocks[0].nonlinearity.register_forward_hook(lambda module, given, out: out + 0.5)
    if name == "in between":
        # Somebody calls the activation with other tensors, and twice with what a norm has made.
        blocks[0].conv1.register_forward_hook(lambda module, given, out: out + blocks[0].nonlinearity(given[0]))
    pipe = pipeline_around(unet)
    pipe.set_progress_bar_config(disable=True)
    everywhere = seen_by_all() if name == "all hooked" else nullcontext()
    with fused_on("cpu") if way == "kernels" else nullcontext(), counted() as activated, everywhere:
        pipe = otil_xdit.parallelize(pipe, config=CASES[name])
        draw = torch.Generator().manual_seed(7)
        words = torch.randn(2, 1, 7, unet.config.cross_attention_dim, generator=draw)
        call = {"prompt_embeds": words[0], "negative_prompt_embeds": words[1], "generator": draw}
        size = {"height": ROWS * PIXELS, "width": COLS * PIXELS}
        made = pipe(**call, **size, num_inference_steps=STEPS, guidance_scale=4.0, output_type="latent").images
        session_of(pipe).detach()
    return made, len(activated)


@contextmanager
def seen_by_all() -> Iterator[None]:
    """Have a hook on all modules give on tensors that are equal, but not the same."""

    def other(module: nn.Module, given: Any, made: Any) -> Any:
        return made.clone() if isinstance(made, torch.Tensor) else None

    handle = register_module_forward_hook(other)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def counted() -> Iterator[list[None]]:
    """Count the calls of `activate_into`."""
    calls: list[None] = []
    activate = group_norm.activate_into

    def noted(*args: Any) -> None:
        calls.append(None)
        activate(*args)

    group_norm.activate_into = noted  # type: ignore[assignment]
    try:
        yield calls
    finally:
        group_norm.activate_into = activate


if __name__ == "__main__":
    main()
