"""A network in two stages (`otil_xdit.hybridiff.stages`), on "meta": where it is cut, and what each CFG group does.

A run finds its cut from the operations of all ranks together; here they are counted on one rank of each height.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch.utils._pytree import tree_leaves

from otil_xdit.dryrun.blocks import BlockWatch
from otil_xdit.dryrun.flops import call_network, conditions_of
from otil_xdit.dryrun.job import Job, ParallelDegrees, Pass
from otil_xdit.dryrun.requests import requests_of
from otil_xdit.hybridiff.boundary import Boundary
from otil_xdit.hybridiff.tracing import Cut, Form, Tracer
from otil_xdit.method.grid import LevelGrid
from otil_xdit.networks.dit.architectures import architecture_of
from otil_xdit.networks.unet.levels import Levels


@dataclass(frozen=True, eq=False)
class Segments:
    """The two segments of a network, as one rank of each CFG group has them.

    Attributes:
        passes: a call of the network with the first, and with the second segment alone.
        boundary: what the first gives the second; a rank keeps two of it.
        prompt: bytes of it that the second CFG group sends to the first one at the window's first step.
        share: of a whole call's operations those of the longer segment, with what is outside both.
        blocks: number of the network's blocks.
    """

    passes: tuple[Pass, Pass]
    boundary: Boundary
    prompt: int
    share: float
    blocks: int


def segments_of(job: Job, degrees: ParallelDegrees, place: int) -> Segments:
    """Cut a rank's part of a network in two.

    Args:
        job: the step.
        degrees: of the ranks that share it.
        place: the rank's, as for `requests_of`.

    Raises:
        ValueError: for a network that cannot be cut, or whose call is not known here.
    """
    watch = BlockWatch(job.network.module)
    whole = requests_of(job, degrees, place, watch, calls_blocks=True)
    prompt = 0
    if job.network.is_unet:
        cut = Cut.of(watch.tracer, _unet_flops(job, degrees, place, watch.tracer))
    else:
        one_pass = replace(job, batch=job.batch // degrees.cfg)
        (own, prompt), (everybody, _) = _dit_call(_own(one_pass, degrees)), _dit_call(one_pass)
        cut = Cut.of(own, _flops(everybody))
    first, second = (
        Pass(watch.entries_of(kept, 0, whole.requests), watch.entries_of(kept, 1, whole.messages))
        for kept in (cut.order[: cut.place], cut.order[cut.place :])
    )
    share = (max(cut.flops) + cut.glue) / (sum(cut.flops) + cut.glue)
    return Segments((first, second), Boundary(cut.forms), prompt, share, len(watch.blocks))


def _unet_flops(job: Job, degrees: ParallelDegrees, place: int, own: Tracer) -> list[int]:
    """Count every block of a U-Net, and what is outside all, on all ranks that share the rows.

    Args:
        job, degrees, place: as for `segments_of`.
        own: the trace of the rank at `place`.
    """
    grid = LevelGrid.build(*job.latent, Levels(job.network.module).count, degrees.rows, degrees.cut.rank_shares)
    heights = [*zip(*grid.rows, strict=True)]  # of each rank, at every level
    total = [0] * (len(own.flops) + 1)
    for height, count in Counter(heights).items():
        if height == heights[place]:
            found = own
        else:
            watch = BlockWatch(job.network.module)
            requests_of(job, degrees, heights.index(height), watch)
            found = watch.tracer
        total = [before + count * flops for before, flops in zip(total, _flops(found), strict=True)]
    return total


def _flops(trace: Tracer) -> list[int]:
    return [*trace.flops, trace.glue]


def _own(one_pass: Job, degrees: ParallelDegrees) -> Job:
    """Return one rank's rows and text of one pass of a DiT, whose tensors are those that travel."""
    ranks = degrees.rows
    joined = architecture_of(one_pass.network.module).text != "none"
    text = -(-one_pass.text // ranks) if joined else one_pass.text
    return replace(one_pass, height=one_pass.height // ranks, text=text)


def _dit_call(job: Job) -> tuple[Tracer, int]:
    """Trace a DiT's call; return the trace, and the bytes of the inputs besides latent and time."""
    watch = BlockWatch(job.network.module)
    with torch.no_grad(), watch.over():
        call_network(job, {})
    given = [leaf for leaf in tree_leaves(conditions_of(job)) if isinstance(leaf, torch.Tensor)]
    return watch.tracer, Boundary([*map(Form.of, given)]).memory.nbytes
