"""Parcels on real gloo ranks: what layers are given, what is sent and counted, what is allocated, what goes wrong.

Shapes: B batch, C channels, W columns, G groups, R ranks that hold rows.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from otil_xdit.comm.collectives import ByKind
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.errors import ExchangeTimeout
from otil_xdit.exchange.buckets import LAYERS_PER_BUCKET
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.method.config import OtilConfig
from tests.support.ranks import run_ranks

ROWS = (3, 2, 4, 2)
"""Rows of each rank, more and fewer than its neighbours'."""
BATCH, GROUPS = 2, 3

STALE: dict[str, Any] = {
    "halo": "displaced",
    "moments": "displaced",
    "warmup_steps": 1,
    "fresh_share": 0.0,
    "codec": "raw",
    "extrapolation": "none",
    "timeout": 20.0,
}
CODED: dict[str, Any] = {"codec": "2bit", "extrapolation": "fitted"}


@dataclass(frozen=True)
class Conv:
    """A convolution: what its map is and how many rows it needs."""

    name: str
    channels: int
    width: int
    above: int
    below: int
    dtype: torch.dtype

    def whole(self, call: int) -> torch.Tensor:
        """The map of the layer's `call`-th call, [B, C, rows of everybody, W]."""
        draw = torch.Generator().manual_seed(sum(self.name.encode()) + 1000 * call)
        return torch.randn(BATCH, self.channels, sum(own_rows()), self.width, generator=draw).to(self.dtype)


CONVS = tuple(
    Conv(
        f"conv.{index}",
        channels=1 + index % 4,
        width=3 + index % 3,
        above=(1, 1, 2, 0)[index % 4],
        below=(1, 0, 1, 2)[index % 4],
        dtype=(torch.float32, torch.float32, torch.float16, torch.float64)[index % 4],
    )
    for index in range(14)
)


def own_rows() -> tuple[int, ...]:
    return ROWS[: dist.get_world_size()]


def moments_of(name: str, call: int) -> torch.Tensor:
    """Everybody's mean and variance at a layer's `call`-th call, [R, 2, B, G]."""
    draw = torch.Generator().manual_seed(sum(name.encode()) + 1000 * call)
    return torch.rand(dist.get_world_size(), 2, BATCH, GROUPS, generator=draw) + 0.5


def make_run(ulysses: int = 1, **settings: Any) -> OtilCommunicator:
    everybody = PatchGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    group = everybody
    if ulysses > 1:
        made = [dist.new_group(range(first, everybody.world_size, ulysses)) for first in range(ulysses)]
        mine, place = made[everybody.rank % ulysses], everybody.rank // ulysses
        group = PatchGroup(mine, place, everybody.world_size // ulysses, ulysses, everybody, everybody)
    return OtilCommunicator(OtilConfig(**{**STALE, **settings}), group)


@dataclass
class Walk:
    """Calls layers of a run and compares what they are given, to the bit, with what every message by itself gives."""

    run: OtilCommunicator
    calls: Counter[str] = field(default_factory=Counter)
    shapes: dict[str, object] = field(default_factory=dict)
    synchronous: bool = False

    def begin(self) -> None:
        self.run.begin()
        self.calls.clear()
        self.shapes.clear()

    def _remote(self, name: str, shape: object) -> tuple[int, int]:
        """The number of this call, and of the call whose values the other ranks have sent for it.

        They are this call's in the first step, and where the layer is new or its map has another shape than before.
        """
        call, known = self.calls[name], self.shapes.get(name)
        self.calls[name], self.shapes[name] = call + 1, shape
        is_fresh = self.synchronous or known != shape or self.run.clock.step == 0
        return call, call if is_fresh else call - 1

    def conv(self, conv: Conv) -> None:
        call, remote = self._remote(conv.name, conv)
        start = sum(own_rows()[: dist.get_rank()])
        rows = slice(start, start + own_rows()[dist.get_rank()])
        own = conv.whole(call)[:, :, rows]
        padded = torch.nn.functional.pad(conv.whole(remote), (0, 0, conv.above, conv.below))
        top = padded[:, :, start : start + conv.above]
        bottom = padded[:, :, rows.stop + conv.above :][:, :, : conv.below]
        seen = self.run.halo(conv.name, own, conv.above, conv.below)
        assert torch.equal(seen, torch.cat([top, own, bottom], dim=2)), (conv, call)

    def norm(self, name: str) -> None:
        call, remote = self._remote(name, BATCH)
        share = torch.tensor(own_rows()) / sum(own_rows())
        own, stale = moments_of(name, call)[dist.get_rank()], moments_of(name, remote)
        mean, var = self.run.moments(name, own[0], own[1], share)
        weights, rank = share[:, None, None], dist.get_rank()
        whole = (weights * stale[:, 0]).sum(0)
        if call != remote:
            squares = torch.addcmul(stale[:, 1], stale[:, 0], stale[:, 0])
            whole = whole + (own[0] - stale[rank, 0])
            square = (weights * squares).sum(0) + (torch.addcmul(own[1], own[0], own[0]) - squares[rank])
            expected = square - whole.square()
            assert torch.equal(var, torch.where(expected < 0, own[1], expected)), (name, call)
        assert torch.equal(mean, whole), (name, call)

    def step(self, convs: tuple[Conv, ...] = CONVS, has_end: bool = True) -> None:
        """A norm before each convolution, then the end of the step as a network has it."""
        for conv in convs:
            self.norm(f"norm of {conv.name}")
            self.conv(conv)
        if has_end:
            self.run.collect(torch.zeros(1))
        self.run.clock.tick()


# ---- what layers are given -----------------------------------------------------------------------------------------


def check_walks(ulysses: int) -> None:
    run = make_run(ulysses)
    for order in (as_they_are, skipped, twice, reordered, wider):
        walk = Walk(run)
        walk.begin()
        for step in range(4):
            # Without its end a step's last parcel is sent when the next step asks.
            walk.step(order(step), has_end=order is not reordered)
        run.end()
    refreshed = Walk(make_run(ulysses, refresh=2))
    refreshed.begin()
    for step in range(4):
        refreshed.synchronous = step == 2
        refreshed.step()
    refreshed.run.end()


def as_they_are(step: int) -> tuple[Conv, ...]:
    return CONVS


def skipped(step: int) -> tuple[Conv, ...]:
    return tuple(conv for index, conv in enumerate(CONVS) if (index + step) % 3)


def twice(step: int) -> tuple[Conv, ...]:
    """A layer that is called again while its parcel is open, and one whose parcel is under way."""
    return (*CONVS[:2], CONVS[0], *CONVS[2:], CONVS[1])


def reordered(step: int) -> tuple[Conv, ...]:
    return CONVS[step:] + CONVS[:step]


def wider(step: int) -> tuple[Conv, ...]:
    """Maps that change in the third step, when some layers are in the open parcel, others under way, others neither."""
    changed = tuple(replace(conv, width=9) for conv in CONVS[:10])
    return {0: CONVS, 1: CONVS, 2: (*CONVS[3:10], *changed)}.get(step, (*changed, *CONVS[10:]))


@pytest.mark.parametrize("ranks, ulysses", [(2, 1), (3, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_layers_are_given_what_they_would_get_by_themselves(ranks: int, ulysses: int) -> None:
    run_ranks(ranks, check_walks, ulysses)


# ---- what is sent --------------------------------------------------------------------------------------------------


def counted(steps: int, count: int, ulysses: int) -> tuple[dict[str, int], dict[str, int]]:
    """Messages and bytes of `steps` displaced steps of `count` convolutions and as many norms."""
    walk = Walk(make_run(ulysses))
    walk.begin()
    convs = tuple(Conv(f"c{index}", 2, 5, 1, 1, torch.float32) for index in range(count))
    for _ in range(1 + steps):
        walk.step(convs)
    walk.run.end()
    report = walk.run.report()
    return steady(report.messages), steady(report.sent_bytes)


def steady(counts: ByKind) -> dict[str, int]:
    """What layers sent after warm-up; kinds of which nothing was sent then are left out."""
    kinds = ("halo", "moments", "padding")
    return {kind: counts[kind]["steady"] for kind in kinds if kind in counts and counts[kind]["steady"]}


def coded() -> dict[str, int]:
    """Bytes of one displaced step whose rows are coded: 3 vectors and a part of one, less than one, and 2."""
    run = make_run(**CODED)
    run.begin()
    share = torch.tensor(own_rows()) / sum(own_rows())
    convs = [Conv(f"c{index}", channels, 5, 1, 1, torch.float32) for index, channels in enumerate((20, 6))]
    convs.append(Conv("half", 8, 8, 1, 1, torch.float16))
    for call in range(2):
        for conv in convs:
            run.moments(conv.name, *moments_of(conv.name, call)[dist.get_rank()], share)
            run.halo(conv.name, conv.whole(call)[:, :, : own_rows()[dist.get_rank()]], 1, 1)
        run.collect(torch.zeros(1))
        run.clock.tick()
    run.end()
    return steady(run.report().sent_bytes)


def padded() -> dict[str, int]:
    walk = Walk(make_run())
    walk.begin()
    for _ in range(3):
        walk.conv(Conv("half", 1, 3, 1, 1, torch.float16))
        walk.conv(Conv("double", 1, 1, 1, 1, torch.float64))
        walk.run.collect(torch.zeros(1))
        walk.run.clock.tick()
    walk.run.end()
    return steady(walk.run.report().sent_bytes)


def all_counted(steps: int, count: int) -> tuple[tuple[dict[str, int], dict[str, int]], dict[str, int], dict[str, int]]:
    return counted(steps, count, 1), padded(), coded()


def test_a_step_sends_few_messages_and_the_same_bytes() -> None:
    steps, count = 1, 56  # convolutions, and as many norms: about as in SD1.5's U-Net
    buckets = math.ceil(2 * count / LAYERS_PER_BUCKET)
    assert buckets == 5
    row, moments = BATCH * 2 * 5 * 4, 2 * BATCH * GROUPS * 4
    sent = {"halo": steps * count * row, "moments": steps * count * moments}
    for found, small, in_codes in run_ranks(2, all_counted, steps, count):
        assert found == ({"halo": steps * buckets}, sent)
        # Padding is counted apart: after 12 bytes, to a multiple of 8.
        assert small["halo"] == 2 * BATCH * (3 * 2 + 8) and small["padding"] == 2 * 4
        # Rows of 200, 60 and 128 numbers are 4, 1 and 2 vectors of 64 codes and a scale.
        assert in_codes["halo"] == (4 + 1 + 2) * 65 and in_codes["moments"] == 3 * moments
    for rank, (messages, size) in enumerate(run_ranks(4, counted, steps, count, 2)):
        neighbours = 2 if rank in (1, 2) else 1
        assert messages == {"halo": steps * buckets * neighbours, "moments": steps * buckets}
        assert size == {"halo": neighbours * sent["halo"], "moments": sent["moments"]}


# ---- what is allocated ---------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {storage_of(tensor) for tensor in tensors_in((args, kwargs))}
        out = function(*args, **kwargs)
        self.made += [
            tensor.untyped_storage().nbytes() for tensor in tensors_in(out) if storage_of(tensor) not in known
        ]
        return out


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


def allocated() -> list[list[list[int]]]:
    return [allocated_by(), allocated_by(**CODED), allocated_by(freshness="sync")]


def allocated_by(**settings: Any) -> list[list[int]]:
    """What the calls of each step allocate."""
    run = make_run(**settings)
    run.begin()
    share = torch.tensor(own_rows()) / sum(own_rows())
    # Two parcels with their norms, the second one larger.
    sizes = [4 if 2 * index < LAYERS_PER_BUCKET else 8 for index in range(LAYERS_PER_BUCKET)]
    convs = [Conv(f"c{index}", channels, 16, 1, 1, torch.float32) for index, channels in enumerate(sizes)]
    maps = [conv.whole(0)[:, :, : own_rows()[dist.get_rank()]] for conv in convs]
    mean, var = moments_of("norm", 0)[dist.get_rank()]
    steps = []
    for _ in range(6):
        with Allocations() as found:
            for conv, x in zip(convs, maps, strict=True):
                run.moments(conv.name, mean, var, share)
                run.halo(conv.name, x, 1, 1)
            run.collect(torch.zeros(1))
        run.clock.tick()
        steps.append(found.made)
    run.end()
    return steps


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_after_two_displaced_steps_nothing_is_allocated(ranks: int) -> None:
    for steps in (steps for all_steps in run_ranks(ranks, allocated) for steps in all_steps):
        assert max(steps[0]) >= BATCH * 8 * 4 * 16 * 4, "the first step makes room"
        # What is left is arithmetic on moments, [R, 2, B, G], and on scales, one for 64 numbers of a parcel's rows; a
        # row is [B, 8, 1, 16] of 4 bytes.
        scales = sum(BATCH * channels * 16 for channels in [8] * (LAYERS_PER_BUCKET // 2)) // 64
        most = max(2 * ranks * BATCH * GROUPS, scales) * 4
        assert most < BATCH * 8 * 16 * 4
        for made in steps[3:]:
            assert max(made) <= most, sorted(set(made))


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def silent_rank() -> tuple[str, float]:
    """Rank 1 does not take part in the second step; what rank 0 says, and how long it takes to say it and to end."""
    # Pairs of a group of their own: gloo closes them after a timeout, and the test's ranks still meet at the end.
    group = PatchGroup(dist.new_group([0, 1]), dist.get_rank(), 2)
    walk = Walk(OtilCommunicator(OtilConfig(**{**STALE, "timeout": 1.0}), group))
    walk.begin()
    convs = (*CONVS, *(replace(conv, name=f"{conv.name} too") for conv in CONVS))
    walk.step(convs)
    if dist.get_rank() == 1:
        time.sleep(5)
        return "", 0.0
    started = time.monotonic()
    with pytest.raises(ExchangeTimeout) as caught:
        for _ in range(2):
            walk.step(convs, has_end=False)  # two parcels, for which the next step waits
    walk.run.end()
    walk.run.begin()
    return str(caught.value), time.monotonic() - started


def test_a_rank_that_does_not_answer_is_an_error_with_its_place() -> None:
    message, seconds = run_ranks(2, silent_rank)[0]
    assert 4 * len(CONVS) > 2 * LAYERS_PER_BUCKET, "a second parcel is under way"
    assert "rank 0 of 2" in message and "the moments of layer norm of conv.0 at step 1" in message and "1 s" in message
    assert seconds < 3, "the second parcel is not waited for"


def interrupted() -> None:
    for alike in (True, False):
        interrupted_once(alike)


def interrupted_once(alike: bool) -> None:
    """After an exception in the middle of a step the next generation is as if nothing had happened."""
    walk = Walk(make_run())
    walk.begin()
    walk.step()
    walk.step()
    most = 5 if alike or dist.get_rank() == 0 else 3
    for conv in CONVS[:most]:
        walk.norm(f"norm of {conv.name}")
        walk.conv(conv)
    walk.run.end()  # what is in the open parcel is nobody's any more, and need not be as much on every rank
    for _ in range(2):
        walk.begin()
        for _ in range(3):
            walk.step()
        walk.run.end()


def test_what_was_not_sent_is_forgotten() -> None:
    run_ranks(2, interrupted)
