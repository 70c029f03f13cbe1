"""An image under `torch.inference_mode` and the next one without it: the same buffers serve both."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
import torch.distributed as dist

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.method.config import OtilConfig
from otil_xdit.runtime.strategies import get_strategy
from tests.support.ranks import run_ranks

STEPS = 5


def run_of(strategy: str) -> OtilCommunicator:
    settings = {"otil": {"fresh_share": 0.0}, "otil-paper": {"select": "kv-cosine"}}.get(strategy, {})
    config = get_strategy(strategy).make_config({"warmup_steps": 1, "timeout": 20.0, **settings})
    assert isinstance(config, OtilConfig)
    return OtilCommunicator(config, PatchGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size()))


def image(run: OtilCommunicator, mode: AbstractContextManager[None]) -> torch.Tensor:
    """What one layer of each kind gives at the last step."""
    draw = torch.Generator().manual_seed(dist.get_rank())
    run.begin()
    with mode:
        for _ in range(STEPS):
            key, value = torch.randn(2, 1, 2, 16, 8, generator=draw)
            x = torch.randn(1, 4, 8, 8, generator=draw)
            found = [*run.gather("a", key, value)]
            found += run.moments("n", x.mean((2, 3)), x.var((2, 3)), torch.tensor([0.5, 0.5]))
            found.append(run.halo("c", x, 1, 1))
            seen = torch.cat([one.flatten() for one in found])
            run.clock.tick()
    run.end()
    return seen.clone()


def images(strategy: str) -> list[bool]:
    """Whether images in either mode, after one in the other, are those of a run of its own."""
    one, other = run_of(strategy), run_of(strategy)
    alone = image(one, torch.no_grad())
    modes = (torch.inference_mode(), torch.no_grad(), torch.inference_mode())
    return [torch.equal(image(other, mode), alone) for mode in modes]


@pytest.mark.parametrize("strategy", ["otil", "otil-paper", "distrifusion", "sync"])
def test_images_in_either_mode_are_the_same(strategy: str) -> None:
    assert run_ranks(2, images, strategy) == [[True] * 3] * 2
