"""The process groups of one image, and how their waits are bounded and ended."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from otil_xdit.comm.failure_detector import FailureDetector

_NEVER_SENT = 2**20 + 1
"""A tag that no message has."""

NCCL_SECONDS = 6 * 3600.0
"""NCCL's own timeout, at least; see `limit_waits`."""

ABORT_SECONDS = 10.0
"""How long aborts may take together."""


@dataclass(frozen=True)
class PatchGroup:
    """The ranks that hold the patches of one image, in the order of the patches.

    Attributes:
        process_group: what the collectives run on.
        rank: this process's place in the group, which is its patch.
        world_size: number of patches.
        ulysses_degree: ranks that share a patch's heads; a patch's sequence is that many rows' chunks in turn.
        rows: the ranks that hold rows (patch x Ulysses), in the order of the rows; None where nobody needs them.
        replica: all ranks that work on the image (rows x CFG); None where nobody needs them.
        passes: the ranks with the same rows, one for each pass of guidance; None where every rank computes all passes.
        detector: knows who failed when a wait does; None for nobody.
    """

    process_group: dist.ProcessGroup
    rank: int
    world_size: int
    ulysses_degree: int = 1
    rows: PatchGroup | None = None
    replica: PatchGroup | None = None
    passes: PatchGroup | None = None
    detector: FailureDetector | None = None


def reason_of(error: BaseException) -> str:
    """Return the gist of a collective's error: its first sentence, without the place in torch's sources."""
    return re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0]).partition(". ")[0]


def is_lost_connection(error: RuntimeError) -> bool:
    """Tell whether a collective failed because of another rank, by the words of gloo, NCCL and torch.

    Args:
        error: raised by any collective, also by one that this package did not start.
    """
    return any(sign in str(error) for sign in ("/gloo/", "Application timeout", "Operation timed out", "NCCL"))


def break_connections(groups: Iterable[dist.ProcessGroup]) -> None:
    """End every wait on these groups at once, on this rank and on those that it is connected to.

    gloo has no call for that. A wait that runs into its own timeout closes all connections of its group, so this
    makes one do that. NCCL's abort ends what this rank has under way; the other ranks must do the same. One
    communicator's abort may wait for another's kernel, which ends when that is aborted: so all are aborted together.

    Args:
        groups: those that the image's collectives run on.
    """
    aborts = []
    for group in groups:
        if dist.get_backend(group) == "gloo":
            with suppress(RuntimeError):
                _break_gloo(group)
        elif hasattr(group, "abort"):
            aborts.append(Thread(target=_abort, args=(group,), name="otil-xdit abort", daemon=True))
    for abort in aborts:
        abort.start()
    deadline = time.monotonic() + ABORT_SECONDS
    for abort in aborts:
        abort.join(max(0.0, deadline - time.monotonic()))


def _break_gloo(group: dist.ProcessGroup) -> None:
    other = dist.get_global_rank(group, (dist.get_rank(group) + 1) % dist.get_world_size(group))
    never = dist.irecv(torch.zeros(1), other, group, _NEVER_SENT)
    assert never is not None, "this rank is in the group"
    never.wait(timedelta(milliseconds=1))


def _abort(group: dist.ProcessGroup) -> None:
    with suppress(RuntimeError):
        group.abort()


def limit_waits(groups: Iterable[dist.ProcessGroup], seconds: float) -> None:
    """Give every collective of these groups a timeout, also those that other packages start.

    Idle groups are not concerned. NCCL's counts from when the host enqueues a message, and ends the process: it is made
    so long that no healthy step reaches it, and `otil_xdit.comm.deadlines` keeps the real one.

    Args:
        groups: to be limited.
        seconds: that a collective may take.
    """
    for group in groups:
        set_timeout = getattr(distributed_c10d, "_set_pg_timeout", None)  # torch has no public way
        if set_timeout is not None:
            at_least = 0.0 if dist.get_backend(group) == "gloo" else NCCL_SECONDS
            set_timeout(timedelta(seconds=max(seconds, at_least)), group)


@dataclass(frozen=True)
class UnetGroups:
    """The ranks that share a U-Net.

    Attributes:
        rows: patch x Ulysses, in the order of the rows.
        ulysses_degree: consecutive ranks of `rows` that share attention heads.
        cfg_degree: number of CFG groups.
        cfg_rank: this rank's CFG group.
        places: of each rank of the replica, in its order: CFG group, and place in `rows`.
        shares: of the rows, for each rank of `rows`, in any unit; empty for equal ones.
    """

    rows: PatchGroup
    ulysses_degree: int
    cfg_degree: int
    cfg_rank: int
    places: tuple[tuple[int, int], ...]
    shares: tuple[int, ...] = ()

    @property
    def peer(self) -> int:
        """Place in the replica of the rank with the same rows in the other CFG group."""
        return self.places.index((1 - self.cfg_rank, self.rows.rank))
