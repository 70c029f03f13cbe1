"""A network in two stages (`otil_xdit.hybridiff.stages`), on "meta": where it is cut, and what each half of the ranks
does.

A run finds its cut from the operations of all ranks together; here they are counted on one rank of each height.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from otil_xdit.dryrun.blocks import UnitWatch
from otil_xdit.dryrun.flops import call_of
from otil_xdit.dryrun.requests import Job, ParallelDegrees, Pass, asks_of
from otil_xdit.hybridiff.boundary import Boundary
from otil_xdit.hybridiff.tracing import Cut, Form, Tracer
from otil_xdit.method.grid import LevelGrid
from otil_xdit.networks.dit.architectures import architecture_of
from otil_xdit.networks.unet.levels import Levels


@dataclass(frozen=True, eq=False)
class Segments:
    """The two segments of a network, as one rank of each half has them.

    Attributes:
        passes: a call of the network with the first, and with the second segment alone.
        boundary: what the first gives the second; a rank keeps two of it.
        prompt: bytes that the second half shows the first one at the window's first step.
        share: of a whole call's operations those of the longer segment, with what is outside both.
        units: number of blocks.
    """

    passes: tuple[Pass, Pass]
    boundary: Boundary
    prompt: int
    share: float
    units: int


def segments_of(job: Job, composition: ParallelDegrees, place: int) -> Segments:
    """Where a rank's part of a network is cut; arguments as those of `asks_of`.

    Raises:
        ValueError: for a network that cannot be cut, or whose call is not known here.
    """
    watch = UnitWatch(job.network.module)
    whole = asks_of(job, composition, place, watch)
    prompt = 0
    if job.network.is_unet:
        cut = Cut.of(watch.tracer, _unet_flops(job, composition, place, watch.tracer))
    else:
        half = replace(job, batch=job.batch // composition.cfg)
        (own, prompt), (everybody, _) = _dit_call(_own(half, composition)), _dit_call(half)
        cut = Cut.of(own, _flops(everybody))
    first, second = (
        Pass(watch.of_units(kept, 0, whole.asks), watch.of_units(kept, 1, whole.others))
        for kept in (cut.order[: cut.place], cut.order[cut.place :])
    )
    share = (max(cut.flops) + cut.glue) / (sum(cut.flops) + cut.glue)
    return Segments((first, second), Boundary(cut.forms), prompt, share, len(watch.units))


def _unet_flops(job: Job, composition: ParallelDegrees, place: int, own: Tracer) -> list[int]:
    """Of every block of a U-Net, and outside all, on all ranks that share the rows; `own` is that of one of them."""
    grid = LevelGrid.build(*job.latent, Levels(job.network.module).count, composition.patches * composition.ulysses)
    heights = [*zip(*grid.rows, strict=True)]  # of each rank, at every level
    total = [0] * (len(own.flops) + 1)
    for height, count in Counter(heights).items():
        if height == heights[place]:
            found = own
        else:
            watch = UnitWatch(job.network.module)
            asks_of(job, composition, heights.index(height), watch)
            found = watch.tracer
        total = [before + count * flops for before, flops in zip(total, _flops(found), strict=True)]
    return total


def _flops(trace: Tracer) -> list[int]:
    return [*trace.flops, trace.glue]


def _own(half: Job, composition: ParallelDegrees) -> Job:
    """One rank's rows and text of one pass of a DiT, whose tensors are those that travel."""
    ranks = composition.patches * composition.ulysses
    joined = architecture_of(half.network.module).text != "none"
    text = -(-half.text // ranks) if joined else half.text
    return replace(half, height=half.height // ranks, text=text)


def _dit_call(job: Job) -> tuple[Tracer, int]:
    """A DiT's call, and the bytes of what it is made with besides latent and time."""
    network, forms, watch = job.network.module, list[Form](), UnitWatch(job.network.module)
    names = list(signature(type(network).forward).parameters)[1:]

    def look(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        always = [value for name, value in given.items() if name not in ("hidden_states", "timestep")]
        forms.extend(Form.of(leaf) for leaf in tree_leaves(always) if isinstance(leaf, torch.Tensor))

    handle = network.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad(), watch.over():
            call_of(job)(job)
    finally:
        handle.remove()
    return watch.tracer, Boundary(forms).memory.nbytes
