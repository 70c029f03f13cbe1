"""What every rank of a check has: its process group, the function that it is asked to call, and one image."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

import otil_xdit
from otil_xdit.tools.common.worker import Answer

PROMPT = "a large red circle on the left and a small blue square on the right, striped background"
SIZE = 128
"""Pixels a side of the images of shipped models."""

GUIDANCE = 4.0


@dataclass(frozen=True)
class Call:
    """A function of a module, and its arguments by name."""

    function: Callable[..., Answer]
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckTask:
    """Ranks that call whatever function they are asked to.

    Attributes:
        shares_card: all ranks are on one card, which NCCL refuses: they talk through gloo.
    """

    shares_card: bool

    def load(self) -> Callable[[Call], Answer]:
        """Enter the process group; return what calls functions."""
        logging.disable(logging.WARNING)  # what xDiT notes at every start would drown an error
        if self.shares_card:
            os.environ["LOCAL_RANK"] = "0"  # before xfuser reads it
        otil_xdit.register()
        if self.shares_card:
            from xfuser import envs

            envs.get_torch_distributed_backend = lambda: "gloo"
        from xfuser.core.distributed import init_distributed_environment

        init_distributed_environment()
        return lambda call: call.function(**call.arguments)


@contextmanager
def parallel(pipe: Any, strategy: str, **given: Any) -> Iterator[Any]:
    """Yield the pipeline as all ranks run it, and give it back as it was.

    Args:
        pipe: of diffusers.
        strategy: by name.
        given: settings that are not the strategy's own.
    """
    config = otil_xdit.get_strategy(strategy).make_config(given)
    shared = otil_xdit.parallelize(pipe, strategy, config)
    shared.set_progress_bar_config(disable=True)
    try:
        yield shared
    finally:
        otil_xdit.restore(shared)


def draw(pipe: Any, steps: int, seed: int = 0, **call: Any) -> torch.Tensor | None:
    """Return the latents of one image of a shipped model, float32 on the CPU; None on a rank that has none.

    Every dtype begins with the same noise. All ranks of a parallel pipeline call this.
    """
    network = pipe.transformer if getattr(pipe, "unet", None) is None else pipe.unet
    side = SIZE // pipe.vae_scale_factor
    noise = torch.randn(1, network.config.in_channels, side, side, generator=torch.Generator().manual_seed(seed))
    size = {"height": SIZE, "width": SIZE, "num_inference_steps": steps, "guidance_scale": GUIDANCE}
    latents = noise.to(network.device, network.dtype)
    with torch.no_grad():
        output = pipe(PROMPT, latents=latents, output_type="latent", **size, **call)
    return None if output is None else output.images.float().cpu()


def draw_alone(pipe: Any, steps: int, seed: int = 0) -> torch.Tensor | None:
    """Return what `draw` does, on rank 0 while the others wait; None on them."""
    dist.barrier()
    latents = draw(pipe, steps, seed) if dist.get_rank() == 0 else None
    dist.barrier()
    return latents


def on_rank_0(value: torch.Tensor | None) -> torch.Tensor | None:
    """Return on rank 0 the tensor of the first rank that has one, and None on the others; all ranks call this."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return next(value for value in values if value is not None) if dist.get_rank() == 0 else None


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the root mean square of the difference, as a share of the reference's."""
    return float((found - reference).norm() / reference.norm())
