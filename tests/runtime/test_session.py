"""Sessions: which layer calls, what a step is, where an image begins, and that nothing is left behind."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.runtime.session import PatchSession
from otil_xdit.xdit.plugin.attention import over_patches
from tests.support.communicators import FakeCommunicator


@over_patches
def ring_attn(attention: Any, query: torch.Tensor, *_: Any) -> torch.Tensor:
    """Stands for xDiT's own; what it does shows that no session was active."""
    return query + 100


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
    return (query,)


class ToyAttention(nn.Module):
    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.calls):
            x = ring_attn(attend, x, x, x)
        return x


class ToyNetwork(nn.Module):
    """Block 0 attends twice in one forward; block 1 is skipped when told so."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ToyAttention(calls=2), ToyAttention()])

    @contextmanager
    def cache_context(self, name: str):
        yield

    def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
        return self.blocks[0](x) if skip else self.blocks[1](self.blocks[0](x))


class ToyScheduler:
    def step(self, x: torch.Tensor) -> torch.Tensor:
        return x


class ToyPipeline:
    """Two passes a step, and a second network for the later steps, as Wan 2.2 has."""

    def __init__(self, contexts: bool = False) -> None:
        self.transformer, self.transformer_2 = ToyNetwork(), ToyNetwork()
        self.scheduler = ToyScheduler()
        self.contexts = contexts
        self.fail_at: int | None = None

    def __call__(self, steps: int, skip_at: int = -1, uncond_from: int = 0) -> torch.Tensor:
        """The docstring stays."""
        audio = copy.deepcopy(self.scheduler)
        x = torch.zeros(1, 1, 2, 1)
        for step in range(steps):
            network = self.transformer if step < 2 else self.transformer_2
            for name in ["cond", "uncond"] if step >= uncond_from else ["cond"]:
                with network.cache_context(name if self.contexts else "same"):
                    network(x, skip=step == skip_at)
            if step == self.fail_at:
                raise KeyError("callback")
            audio.step(x)  # LTX steps a copy of its scheduler besides; it must not count
            x = self.scheduler.step(x)
        return x


@pytest.fixture
def fake() -> FakeCommunicator:
    return FakeCommunicator()


def attached(fake: FakeCommunicator, **settings: Any) -> tuple[PatchSession, ToyPipeline]:
    pipe = ToyPipeline(**settings)
    session = PatchSession(fake, PatchGroup(None, 0, 2), allow_untested=True)
    session.attach(pipe)
    return session, pipe


def test_every_call_has_its_own_name_and_keeps_it(fake: FakeCommunicator) -> None:
    _, pipe = attached(fake)
    pipe(steps=4)
    by_step = [[name for step, name in fake.gathered if step == wanted] for wanted in range(4)]
    assert by_step[0] == by_step[1] and by_step[2] == by_step[3]
    assert all(len(set(names)) == len(names) == 6 for names in by_step)
    assert not set(by_step[0]) & set(by_step[2]), "two networks share a buffer"


def test_a_skipped_layer_moves_no_other(fake: FakeCommunicator) -> None:
    _, pipe = attached(fake)
    pipe(steps=2, skip_at=1)
    first, second = (([name for step, name in fake.gathered if step == wanted]) for wanted in (0, 1))
    assert set(first) - set(second) == {name for name in first if "blocks.1" in name}
    assert set(second) < set(first)


def test_passes_that_diffusers_names_keep_apart_even_when_one_starts_later(fake: FakeCommunicator) -> None:
    _, pipe = attached(fake, contexts=True)
    pipe(steps=2, uncond_from=1)
    names = [{name for step, name in fake.gathered if step == wanted} for wanted in (0, 1)]
    assert names[1] - names[0] == {name for name in names[1] if "/uncond/" in name} != set()


def test_images_are_named_alike_and_bracketed(fake: FakeCommunicator) -> None:
    _, pipe = attached(fake)
    pipe(steps=3)
    first = list(fake.gathered)
    fake.gathered.clear()
    pipe(steps=3)
    assert fake.gathered == first and fake.begun == fake.ended == 2


def test_an_exception_ends_the_generation_and_the_next_image_is_as_ever(fake: FakeCommunicator) -> None:
    _, pipe = attached(fake)
    pipe(steps=3)
    expected = list(fake.gathered)
    pipe.fail_at = 1
    with pytest.raises(KeyError):
        pipe(steps=3)
    assert fake.ended == 2 and PatchSession.active() is None
    assert type(pipe.scheduler) is ToyScheduler
    pipe.fail_at = None
    fake.gathered.clear()
    pipe(steps=3)
    assert fake.gathered == expected


def test_outside_a_generation_xdit_attends_as_it_did(fake: FakeCommunicator) -> None:
    _, pipe = attached(fake)
    x = torch.zeros(1, 1, 2, 1)
    pipe(steps=1)
    fake.gathered.clear()
    assert (pipe.transformer(x) == 300).all() and fake.gathered == []


def test_detach_leaves_nothing(fake: FakeCommunicator) -> None:
    session, pipe = attached(fake)
    assert type(pipe) is not ToyPipeline and type(pipe).__name__ == "ToyPipeline"
    assert type(pipe).__call__.__doc__ == ToyPipeline.__call__.__doc__
    pipe(steps=1)
    session.detach()
    assert type(pipe) is ToyPipeline and vars(pipe).keys() == vars(ToyPipeline()).keys()
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in pipe.transformer.modules()]
    assert all(not before and not after for before, after in hooks)
    assert "cache_context" not in vars(pipe.transformer)
    fake.gathered.clear()
    pipe(steps=1)
    assert fake.gathered == [] and fake.begun == 1


def test_attaching_twice_counts_once_and_two_sessions_are_refused(fake: FakeCommunicator) -> None:
    session, pipe = attached(fake)
    session.attach(pipe)
    pipe(steps=1)
    assert fake.begun == 1
    with pytest.raises(ValueError, match="already"):
        PatchSession(FakeCommunicator(), PatchGroup(None, 0, 2), allow_untested=True).attach(pipe)


def test_attention_from_nowhere_is_refused(fake: FakeCommunicator) -> None:
    session, pipe = attached(fake)
    x = torch.zeros(1, 1, 2, 1)
    with session.generation(pipe), pytest.raises(ValueError, match="not supported with --parallel"):
        ring_attn(attend, x, x, x)


@pytest.mark.parametrize("wrong", [{"is_causal": True}, {"attention_kwargs": {"indices_k": torch.zeros(1)}}])
def test_attention_that_patches_would_get_wrong_is_refused(fake: FakeCommunicator, wrong: dict[str, Any]) -> None:
    session, pipe = attached(fake)
    x = torch.zeros(1, 1, 2, 1)
    with session.generation(pipe), pytest.raises(ValueError, match="not supported with --parallel"):
        ring_attn(attend, x, x, x, **wrong)
