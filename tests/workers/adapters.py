"""Adapters of PEFT round convolutions, on the ranks of a torchrun; rank 0 prints a JSON line for each.

    torchrun --standalone --nproc_per_node 2 tests/workers/adapters.py

A line: the largest difference to one process under `sync` or None, the refusal or None; the same of the adapter merged
into the weights, and of the adapter where nothing refuses it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from peft import BOFTConfig, HiraConfig, HRAConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit.networks.unet import model  # noqa: E402
from tests.workers.unet_session import image, pipeline  # noqa: E402

CONVS = ["conv1", "conv2"]
LINEAR = ["to_q", "to_k", "to_v", "to_out.0"]
ADAPTERS: dict[str, Callable[[list[str]], Any]] = {
    "LoRA": lambda targets: LoraConfig(r=4, target_modules=targets, init_lora_weights=False),
    "DoRA": lambda targets: LoraConfig(r=4, target_modules=targets, init_lora_weights=False, use_dora=True),
    "LoKr": lambda targets: LoKrConfig(r=4, target_modules=targets, init_weights=False),
    "LoHa": lambda targets: LoHaConfig(r=4, target_modules=targets, init_weights=False),
    "HRA": lambda targets: HRAConfig(r=4, target_modules=targets, init_weights=False),
    "HiRA": lambda targets: HiraConfig(r=4, target_modules=targets, init_weights=False),
    "BOFT": lambda targets: BOFTConfig(boft_block_size=4, target_modules=targets, init_weights=False),
    "IA3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=[], init_ia3_weights=False),
    "IA3 of inputs": lambda targets: IA3Config(
        target_modules=targets, feedforward_modules=targets, init_ia3_weights=False
    ),
}


def main() -> None:
    otil_xdit.register()
    torch.set_num_threads(1)
    for name, make in ADAPTERS.items():
        found = {
            "on convolutions": measured(make(CONVS)),
            "merged": measured(make(CONVS), merge=True),
            "not refused": measured(make(CONVS), patch.object(model, "check_adapter", lambda name, module: None)),
            "on linear layers": measured(make(LINEAR)),
        }
        if dist.get_rank() == 0:
            print(json.dumps({"adapter": name, **found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measured(
    config: Any, unchecked: AbstractContextManager[Any] | None = None, merge: bool = False
) -> dict[str, float | str | None]:
    pipe = adapted(config, merge)
    alone = draw(pipe)
    pipe = otil_xdit.parallelize(pipe, "sync")
    try:
        with unchecked or nullcontext():
            difference, refused = (draw(pipe) - alone).abs().max().item(), None
    except ValueError as error:
        difference, refused = None, str(error)
    otil_xdit.restore(pipe)
    return {"difference": difference, "refused": refused}


def adapted(config: Any, merge: bool) -> Any:
    """A pipeline with an adapter whose weights are large enough to matter."""
    pipe = pipeline()
    torch.manual_seed(0)
    pipe.unet.add_adapter(config)
    for name, weight in pipe.unet.named_parameters():
        if ".default" in name:
            torch.nn.init.normal_(weight.data, mean=1.0 if "magnitude" in name or "ia3" in name else 0.0, std=0.2)
    pipe.unet.requires_grad_(False)
    if merge:
        pipe.unet.fuse_lora()
    return pipe


def draw(pipe: Any) -> torch.Tensor:
    return image(pipe, steps=1)


if __name__ == "__main__":
    main()
