"""The session of an image's ranks: their process groups, failure detector and communicator."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from otil_xdit.comm.failure_detector import FailureDetector
from otil_xdit.comm.groups import PatchGroup, UnetGroups, break_connections, limit_waits
from otil_xdit.comm.store import default_store
from otil_xdit.exchange.report import Report
from otil_xdit.method.config import OtilConfig
from otil_xdit.runtime.agreement import facts_of_settings, versions
from otil_xdit.runtime.card_agreement import facts_of_card
from otil_xdit.runtime.session import PatchSession
from otil_xdit.runtime.vae_sharing import VaeSharing
from otil_xdit.xdit.flags.choice import ParallelChoice

logger = logging.getLogger("otil_xdit")

_SETUP_SECONDS = 1800.0
"""What ranks wait for each other before the first generation, while they load weights: torch's default for gloo."""


def connect(choice: ParallelChoice) -> PatchSession:
    """Make the session over the ranks that this process works on one image with.

    Every rank of the image calls this; xDiT's process groups must exist.

    Args:
        choice: what the command line, or `otil_xdit.parallelize`, asks for.

    Returns:
        The session, attached to no pipeline yet.
    """
    from xfuser.core.distributed import parallel_state
    from yunchang.globals import PROCESS_GROUP

    ring, sequence = PROCESS_GROUP.RING_PG, parallel_state.get_sp_group()
    replica = parallel_state.get_model_replica_group()
    connections = _connections(ring, PROCESS_GROUP.ULYSSES_PG, sequence, replica, parallel_state.get_cfg_group())
    limit_waits(connections, _SETUP_SECONDS)
    timeout = getattr(choice.config, "timeout", OtilConfig.timeout)
    detector = _make_detector(replica, connections, timeout)
    rows = PatchGroup(sequence.device_group, sequence.rank_in_group, sequence.world_size, detector=detector)
    place = dist.get_rank(ring) * choice.ulysses_degree + sequence.ulysses_rank
    assert rows.rank == place, "xDiT's sequence ranks are expected in the order ring x Ulysses"
    # Keys and values have the ring's communicator, and what is waited for must not queue behind them. Where the same
    # ranks hold the rows and the image, one more is enough for rows, moments and output: each takes memory on a card.
    urgent = sequence if sequence.ranks == replica.ranks else replica
    cfg = parallel_state.get_cfg_group()
    group = PatchGroup(
        ring,
        dist.get_rank(ring),
        dist.get_world_size(ring),
        choice.ulysses_degree,
        rows,
        PatchGroup(urgent.device_group, replica.rank_in_group, replica.world_size, detector=detector),
        PatchGroup(cfg.device_group, cfg.rank_in_group, cfg.world_size, detector=detector),
        detector,
    )
    cfg_rank = parallel_state.get_classifier_free_guidance_rank()
    cfg_degree = parallel_state.get_classifier_free_guidance_world_size()
    places = tuple(divmod(number, sequence.world_size) for number in range(replica.world_size))
    assert places[replica.rank_in_group] == (cfg_rank, place), "xDiT's replicas are expected in the order CFG x rows"
    assert not isinstance(choice.patch_shares, str), "a measured step has decided by now"
    shares = tuple(share for share in choice.patch_shares for _ in range(choice.ulysses_degree))
    unets = UnetGroups(rows, choice.ulysses_degree, cfg_degree, cfg_rank, places, shares)
    communicator = choice.strategy.connect(choice.config, group)
    limit_waits(connections, timeout)
    facts = {
        **versions(),
        **facts_of_settings(choice.strategy.name, choice.config),
        **facts_of_card(choice.config),
        "the number of patches": str(group.world_size),
        "the Ulysses degree": str(choice.ulysses_degree),
        "the CFG degree": str(cfg_degree),
        "patch_shares": str(choice.patch_shares),
    }
    return PatchSession(
        communicator,
        group,
        _reporter(choice),
        (unets, _attend),
        facts,
        choice.strategy.name,
        choice.allow_untested,
        VaeSharing(group.replica, timeout, cfg_degree * shares)
        if choice.vae == "patches" and group.replica is not None
        else None,
    )


def _connections(*groups: Any) -> list[dist.ProcessGroup]:
    """Return the process groups on which this rank may wait for others; xDiT's coordinators have two each."""
    found: list[dist.ProcessGroup] = []
    for group in groups:
        found += [group.device_group, group.cpu_group] if hasattr(group, "device_group") else [group]
    return [group for group in found if dist.get_world_size(group) > 1]


def _make_detector(replica: Any, groups: list[dist.ProcessGroup], timeout: float) -> FailureDetector | None:
    """Make what tells the ranks of an image of each other's failures; None for a single rank."""
    if replica.world_size == 1:
        return None
    names: list[Any] = [None] * replica.world_size
    dist.all_gather_object(names, uuid.uuid4().hex, group=replica.cpu_group)
    connections = replica.device_group.group_name
    host = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
    sever = partial(break_connections, groups)
    return FailureDetector(names[0], connections, replica.ranks, dist.get_rank(), timeout, default_store(), host, sever)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Compute a U-Net's self-attention as xDiT's DiTs do theirs; [B, heads, S, d]."""
    from xfuser.model_executor.layers import usp

    out: torch.Tensor = usp.USP(query, key, value)
    return out


def _reporter(choice: ParallelChoice) -> Callable[[PatchSession], None]:
    """Return what logs a generation's report, and writes it where a file is named, on rank 0 only."""

    def finished(session: PatchSession) -> None:
        if dist.get_rank() != 0:
            return
        report = session.report()
        logger.info(
            "%s: %d steps (%d warm-up), sent per step and rank after warm-up: %.1f kB of keys and values, %.1f kB of "
            "halo rows and moments, %.1f kB of output; %s, buffers %.1f MB",
            choice.strategy.name,
            report.steps,
            report.warmup_steps,
            report.kv_bytes_per_step / 1e3,
            report.small_bytes_per_step / 1e3,
            report.output_bytes_per_step / 1e3,
            _waiting(report),
            report.buffer_bytes / 1e6,
        )
        if choice.report is not None:
            Path(choice.report).write_text(
                json.dumps({"strategy": choice.strategy.name, **report.to_dict()}, indent=2) + "\n"
            )

    return finished


def _waiting(report: Report) -> str:
    """Say how long an image waited for messages, on the clock of what waits."""
    if report.device_waited_seconds is None:
        return f"waited {report.waited_seconds:.2f} s"
    each = 1e3 * report.device_waited_seconds / report.timed_steps
    return f"the GPU waited {each:.1f} ms in each of {report.timed_steps} timed steps"
