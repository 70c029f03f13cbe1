"""Unequal shares of DiTs' tokens under every strategy, and measured shares, on the ranks of a torchrun.

    torchrun --standalone --nproc_per_node 2 tests/workers/unequal_dits.py

Rank 0 prints a JSON line for each network and strategy: the largest difference from one process, over the largest
latent; whether a second run gives the same bits, and all ranks have them; the tokens of a rank. For `auto` rank 0
counts as twice as fast.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from otil_xdit.xdit.cpu import enable_cpu_ranks  # noqa: E402

enable_cpu_ranks()

import otil_xdit  # noqa: E402
from otil_xdit.runtime.strategies import get_strategy  # noqa: E402
from otil_xdit.xdit.plugin import measured_shares  # noqa: E402
from tests.support.dits import CASES  # noqa: E402
from tests.support.in_rank import settle, tell  # noqa: E402

NAMES = ("wan, 27 tokens", "qwen-image, 7 text tokens", "flux, 7 text tokens")
STRATEGIES = ("sync", "naive", "distrifusion", "compact-1bit", "compact-2bit", "otil")
"""All but `otil-paper`, which looks at squares of the latent, and `hybridiff`, for which these have no stages."""
STEPS = 8


def main() -> None:
    settle()
    dist.init_process_group("gloo")
    for name in NAMES:
        pipe = CASES[name].build()
        pipe.set_progress_bar_config(disable=True)
        alone = latents(name, pipe)
        for strategy in STRATEGIES:
            tell([name, strategy], drawn(name, pipe, alone, strategy, (3, 2)))
        with patch.object(measured_shares, "step_seconds", lambda pipe: 1.0 + dist.get_rank()):
            tell([name, "auto"], drawn(name, pipe, alone, "sync", "auto"))
        tell([name, "measured"], measured_shares.step_seconds(pipe))
    dist.barrier()
    dist.destroy_process_group()


def drawn(name: str, pipe: Any, alone: torch.Tensor, strategy: str, shares: tuple[int, ...] | str) -> dict[str, Any]:
    """Draw twice on patches of these shares."""
    settings = {} if strategy == "sync" else {"warmup_steps": 2}
    config = get_strategy(strategy).make_config(settings)
    made = otil_xdit.parallelize(pipe, strategy, config, patch_shares=shares)
    tokens: list[int] = []
    block = next(module[0] for module in pipe.transformer.modules() if isinstance(module, nn.ModuleList))
    hook = block.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append([*args, *kwargs.values()][0].shape[1]), with_kwargs=True
    )
    first, second = latents(name, made), latents(name, made)
    hook.remove()
    otil_xdit.restore(made)
    same = [torch.empty_like(first) for _ in range(dist.get_world_size())]
    dist.all_gather(same, first)
    return {
        "error": (first - alone).abs().max().item() / alone.abs().max().item(),
        "repeats": torch.equal(first, second),
        "alike": all(torch.equal(first, one) for one in same),
        "tokens": tokens[0],
    }


def latents(name: str, pipe: Any) -> torch.Tensor:
    return pipe(**{**CASES[name].arguments(), "num_inference_steps": STEPS, "return_dict": False})[0]


if __name__ == "__main__":
    main()
