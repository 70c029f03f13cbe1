"""Messages of a device over gloo, which reads and writes the host's memory only.

Two ranks on one card talk so: NCCL takes one rank a card. It is slow, and only `otil-xdit check` starts such ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

Transfer = tuple[Callable[..., Any], torch.Tensor, int]
"""`dist.isend` or `dist.irecv`, the tensor to send or fill, and the other rank's place in the group."""


class HostTransfer:
    """A message through a copy on the host; what is used of a `torch.distributed.Work`.

    Args:
        copy: on the host, sent or filled.
        target: on the device, filled by the wait; None of a message that is sent.
    """

    def __init__(self, copy: torch.Tensor, target: torch.Tensor | None) -> None:
        self._copy, self._target = copy, target
        self.work: Any = None

    def wait(self, timeout: timedelta) -> bool:
        """Wait as `Work.wait` does, and copy what was received to the device."""
        done = bool(self.work.wait(timeout))
        if self._target is not None:
            self._target.copy_(self._copy)
        return done


def is_on_host(tensor: torch.Tensor) -> bool:
    """Tell whether gloo can read and write a tensor."""
    return tensor.device.type == "cpu"


def start_through_host(transfers: list[Transfer], group: dist.ProcessGroup) -> list[Any]:
    """Start messages, in their order, through copies on the host.

    Args:
        transfers: of tensors on a device.
        group: of gloo.
    """
    works, operations = [], []
    for way, tensor, peer in transfers:
        receives = way is dist.irecv
        copy = torch.empty(tensor.shape, dtype=tensor.dtype) if receives else tensor.detach().to("cpu", copy=True)
        works.append(HostTransfer(copy, tensor if receives else None))
        operations.append(dist.P2POp(way, copy, group=group, group_peer=peer))
    for one, work in zip(works, dist.batch_isend_irecv(operations), strict=True):
        one.work = work
    return works
