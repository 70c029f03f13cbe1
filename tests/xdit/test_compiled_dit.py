"""A DiT on patches under torch.compile: attention is one operator in its graph, which serves every step and block.

A toy network calls xDiT's ring attention; what other ranks would send is looped back (`tests.support.looped`). xDiT's
own wrappers are compiled in `tests/workers/compiled_dits.py`, and on real ranks in `tests/workers/compiled.py`.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.method.config import OtilConfig
from otil_xdit.runtime.session import PatchSession
from otil_xdit.xdit.plugin.register import register
from tests.support.looped import LoopedCollectives
from tests.support.torchrun import WORKERS

HEADS, TOKENS, SIZE, STEPS = 2, 16, 8, 4


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RANK", "0")
    register()
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class ToyAttention(nn.Module):
    """Attention as xDiT's processors make it, with and without text that is joined to this rank's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(HEADS * SIZE, 3 * HEADS * SIZE)
        usp: Any = importlib.import_module("xfuser.model_executor.layers.usp")
        backends: Any = importlib.import_module("xfuser.core.distributed.attention_backend")
        self.usp, self.backend = usp, backends.AttentionBackendType.SDPA

    def forward(self, x: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
        joint = None if text is None else {"joint_key": text, "joint_value": text, "joint_strategy": "rear"}
        function = self.usp._get_attention_function(backend=self.backend)
        out = self.usp.ring_attn(function, query, key, value, joint_attn_kwargs=joint)
        return x + out.transpose(1, 2).flatten(2)


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = ToyAttention()

    def forward(self, x: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        return torch.tanh(self.attn(x, text))


class ToyNetwork(nn.Module):
    def __init__(self, blocks: int = 12) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ToyBlock() for _ in range(blocks)])

    def forward(self, x: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, text)
        return x


class ToyScheduler:
    def step(self, x: torch.Tensor) -> torch.Tensor:
        return x


class ToyPipeline:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer: Any = ToyNetwork().requires_grad_(False)
        self.scheduler = ToyScheduler()

    def __call__(self, steps: int = STEPS, text: bool = False) -> list[torch.Tensor]:
        dice, seen = torch.Generator().manual_seed(1), []
        words = torch.randn(1, HEADS, 3, SIZE, generator=dice) if text else None
        for _ in range(steps):
            seen.append(self.transformer(torch.randn(1, TOKENS, HEADS * SIZE, generator=dice), words))
            self.scheduler.step(seen[-1])
        return seen


def attached(pipe: Any, **settings: Any) -> PatchSession:
    nobody: Any = None
    group = PatchGroup(nobody, 0, 2)
    config = OtilConfig(**{"warmup_steps": 1, "fresh_share": 0.0, **settings})
    session = PatchSession(OtilCommunicator(config, group, LoopedCollectives), group, allow_untested=True)
    session.attach(pipe)
    return session


def graphs() -> tuple[int, int]:
    """Graphs that were made, and breaks of one."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def compiled(pipe: ToyPipeline, how: str, backend: str = "eager") -> None:
    options: dict[str, Any] = {"backend": backend, "fullgraph": True}
    if how == "module":
        pipe.transformer = torch.compile(pipe.transformer, **options)
    elif how == "in place":
        pipe.transformer.compile(**options)
    else:
        for block in pipe.transformer.blocks:
            block.compile(**options)


@pytest.mark.parametrize(
    ("how", "text"),
    [("module", True), ("in place", False), ("blocks", True), pytest.param("blocks", False, marks=pytest.mark.slow)],
)
def test_one_graph_serves_every_step_and_every_block(how: str, text: bool) -> None:
    pipe, again = ToyPipeline(), ToyPipeline()
    attached(pipe), attached(again)
    plain = pipe(text=text)
    compiled(again, how)
    assert all(map(torch.equal, plain, again(text=text)))
    assert all(map(torch.equal, plain, again(text=text)))
    assert graphs() == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["patches", "ulysses"])
def test_wrappers_of_xdit_have_one_graph_as_without_a_strategy(how: str) -> None:
    names = ["flux", "flux2", "qwen-image"]
    run = subprocess.run(
        [sys.executable, str(WORKERS / "compiled_dits.py"), how, *names],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [line["case"] for line in found] == names, run.stderr[-4000:]
    assert all((line["graphs"], line["breaks"], line["difference"]) == (1, {}, 0.0) for line in found), found
