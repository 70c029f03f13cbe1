"""Messages of a device over gloo: the same numbers through copies on the host."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from otil_xdit.comm import collectives, host_copies
from otil_xdit.comm.collectives import CollectiveLabel, Collectives, CounterKey
from otil_xdit.comm.groups import PatchGroup
from tests.support.ranks import run_ranks

LABEL = CollectiveLabel("test", "layer a", None)


class Arrived:
    """A message that has arrived."""

    def wait(self, timeout: timedelta) -> bool:
        return timeout == timedelta(seconds=3)


def test_the_device_is_written_to_by_the_wait() -> None:
    copy, target = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    transfer = host_copies.HostTransfer(copy, target)
    transfer.work = Arrived()
    assert not target.any()
    assert transfer.wait(timedelta(seconds=3))
    assert torch.equal(target, copy)


def exchanged(is_on_device: bool) -> list[torch.Tensor]:
    """What a rank receives of an all-gather and of its neighbours, as if its tensors were on a device or not."""
    through: list[Any] = []
    start = host_copies.start_through_host
    with pytest.MonkeyPatch.context() as patch:
        if is_on_device:
            patch.setattr(collectives, "is_on_host", lambda tensor: False)
        patch.setattr(collectives, "start_through_host", lambda *given: through.append(given) or start(*given))
        rank, ranks = dist.get_rank(), dist.get_world_size()
        sender = Collectives(PatchGroup(dist.group.WORLD, rank, ranks), timeout=20.0)
        payload = torch.arange(6.0).view(2, 3) + 10 * rank
        gathered = sender.all_gather(payload, torch.zeros(ranks, 2, 3), LABEL).wait()
        shares = {CounterKey("test"): payload.nbytes}
        output = torch.zeros(2, 3), torch.zeros(2, 3)
        neighbours = sender.neighbours(payload, -payload, output, (shares, shares), LABEL).wait()
    assert len(through) == (2 if is_on_device else 0)
    return [gathered, *neighbours]


def both_ways() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return exchanged(False), exchanged(True)


def test_ranks_receive_the_same_through_the_host() -> None:
    for plain, through_host in run_ranks(3, both_ways):
        assert all(map(torch.equal, plain, through_host))
        assert plain[0][2, 1, 2] == 25
