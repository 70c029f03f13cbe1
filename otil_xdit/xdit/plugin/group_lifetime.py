"""How long xDiT's process groups live: xDiT makes them once a process, whatever degrees a later pipeline asks for.

A pipeline that is restored needs them no more. The next one gets groups of its own degrees where these differ; without
that xDiT would run it on the old ones, and a pipeline of two Ulysses ranks would meet ring attention.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from weakref import WeakSet

import torch.distributed as dist

from otil_xdit.runtime.session import PatchSession


class GroupLifetime:
    """Who uses the groups that this process has.

    Attributes:
        generation: how often groups were given up; a session of an earlier one has none.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._sessions: WeakSet[PatchSession] = WeakSet()
        self._pipelines: WeakSet[Any] = WeakSet()
        self._had_pipeline = False

    def used_by(self, pipeline: Any, session: PatchSession | None) -> None:
        """Record a pipeline of the groups, and its session where it has one."""
        self._pipelines.add(pipeline)
        self._had_pipeline = True
        if session is not None:
            self._sessions.add(session)

    def released_by(self, pipeline: Any) -> None:
        """Record that a pipeline computes on one rank again."""
        self._pipelines.discard(pipeline)

    def give_up(self, parallel: Any) -> None:
        """Destroy the groups where a config asks for other degrees and nobody can use them any more.

        Every rank calls this at the same place, as it makes the next pipeline; nothing is sent. Groups that no
        pipeline was made for, as a script of xDiT has them, are its own.

        Args:
            parallel: xDiT's parallel config of that pipeline.
        """
        made = degrees_of_groups()
        if made is None or not self._had_pipeline or degrees_of(parallel) == made:
            return
        if self._pipelines or any(session.is_attached for session in self._sessions):
            return
        _destroy_groups()
        self.generation, self._had_pipeline = self.generation + 1, False


LIFETIME = GroupLifetime()
"""Of this process's groups, which are xDiT's module-wide ones."""


def degrees_of(parallel: Any) -> tuple[int, int, int]:
    """Return the ring, Ulysses and CFG degrees of xDiT's parallel config."""
    return parallel.ring_degree, parallel.ulysses_degree, parallel.cfg_degree


def degrees_of_groups() -> tuple[int, int, int] | None:
    """Return the ring, Ulysses and CFG degrees that xDiT's groups were made for; None where there are none."""
    from xfuser.core.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return None
    sequence = parallel_state.get_sp_group()
    cfg_degree = parallel_state.get_classifier_free_guidance_world_size()
    return sequence.ring_world_size, sequence.ulysses_world_size, cfg_degree


def _destroy_groups() -> None:
    """Destroy xDiT's groups, and those that its own `destroy_model_parallel` leaves."""
    from xfuser.core.distributed import parallel_state
    from yunchang.globals import PROCESS_GROUP

    left = [PROCESS_GROUP.RING_PG, PROCESS_GROUP.ULYSSES_PG, parallel_state._DIT, *_spare_groups(parallel_state._PP)]
    parallel_state.destroy_model_parallel()
    PROCESS_GROUP.RING_PG = PROCESS_GROUP.ULYSSES_PG = parallel_state._DIT = None
    for group in left:
        with suppress(ValueError):  # where this rank is in none
            dist.destroy_process_group(group)


def _spare_groups(pipeline: Any) -> list[dist.ProcessGroup]:
    """Return the groups of xDiT's coordinator of a pipeline that its own `destroy` does not know.

    It has a group for each direction where two ranks are in a pipeline, and one for the skips of a U-Net's blocks.
    """
    if pipeline is None:
        return []
    found = [*pipeline.device_groups, *pipeline.cpu_groups, getattr(pipeline, "skip_device_group", None)]
    return [one for one in found if one not in (None, pipeline.device_group, pipeline.cpu_group)]
