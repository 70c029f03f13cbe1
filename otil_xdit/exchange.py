"""The communicator between patches: the only module of the package that touches collectives.

Every collective is asynchronous, has a timeout that names rank, layer and step, and is counted where it is sent:
from the tensor that is handed to it.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

# torch 2.13 renamed the collective and warns under the old name; older versions know only that.
_all_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class PatchGroup:
    """The ranks that hold the patches of one image, in the order of the patches.

    Attributes:
        process_group: what the collectives run on.
        rank: this process's place in the group, which is its patch.
        world_size: number of patches.
        ulysses_degree: ranks that share a patch's heads; a patch's sequence is that many rows' chunks in turn.
    """

    process_group: dist.ProcessGroup
    rank: int
    world_size: int
    ulysses_degree: int = 1


@dataclass
class Traffic:
    """What one rank handed to collectives and how long it waited for them, by kind of message.

    `sent` holds bytes of this rank's payloads; an all-gather delivers each of them to world_size - 1 receivers.
    """

    sent: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    waited: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def clear(self) -> None:
        for counter in (self.sent, self.messages, self.waited):
            counter.clear()


class ExchangeTimeout(RuntimeError):
    """The other ranks did not answer in time, or the connection to them broke."""


class Pending:
    """A collective under way; `wait` gives its output."""

    def __init__(self, exchange: Exchange, work: dist.Work, output: torch.Tensor, kind: str, where: str) -> None:
        self._exchange, self._work, self._output = exchange, work, output
        self._kind, self._where = kind, where

    def wait(self) -> torch.Tensor:
        """The gathered tensor, [N, ...]; on CUDA the current stream waits, on the CPU this thread does.

        Raises:
            ExchangeTimeout: naming the rank, the layer and the step.
        """
        started = time.perf_counter()
        try:
            self._exchange.wait_for(self._work)
        except RuntimeError as error:
            raise ExchangeTimeout(self._exchange.failure(self._where, error)) from error
        self._exchange.traffic.waited[self._kind] += time.perf_counter() - started
        return self._output


class Exchange:
    """All-gathers over one patch group, with counters and timeouts.

    Args:
        group: the patches' ranks.
        timeout: seconds that one wait may take.
    """

    def __init__(self, group: PatchGroup, timeout: float) -> None:
        self.group = group
        self.traffic = Traffic()
        self._timeout = timeout
        # gloo waits on the host and takes a deadline per wait. NCCL's wait only queues a dependency on the stream;
        # given a deadline it would block the host in every layer, so there the process group's own timeout rules.
        self._host_waits = dist.get_backend(group.process_group) == "gloo"

    def all_gather(self, payload: torch.Tensor, output: torch.Tensor, kind: str, where: str) -> Pending:
        """Start sending `payload` to every rank of the group.

        Args:
            payload: contiguous, same shape and dtype on every rank; must stay unchanged until the wait.
            output: [N, *payload.shape], contiguous; filled by the wait.
            kind: the counter that the bytes go to.
            where: "layer ... at step ..." for error messages.

        Every rank of the group must reach this call in the same order, so no caller may skip it on a condition that
        differs between ranks.
        """
        assert payload.is_contiguous() and output.is_contiguous(), f"{where}: collectives need contiguous tensors"
        self.traffic.sent[kind] += payload.nbytes
        self.traffic.messages[kind] += 1
        flat = output.view(-1)
        try:
            work = _all_gather_flat(flat, payload.view(-1), group=self.group.process_group, async_op=True)
        except RuntimeError as error:
            raise ExchangeTimeout(self.failure(where, error)) from error
        return Pending(self, work, output, kind, where)

    def wait_for(self, work: dist.Work) -> None:
        if self._host_waits:
            work.wait(timedelta(seconds=self._timeout))
        else:
            work.wait()

    def failure(self, where: str, error: BaseException) -> str:
        reason = str(error).splitlines()[0]
        return (
            f"rank {self.group.rank} of {self.group.world_size}: no answer from the other patches for {where} "
            f"within {self._timeout:g} s ({reason})"
        )
