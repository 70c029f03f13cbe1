"""How the ranks of a run exchange keys and values: ways to put something in the place of xDiT's ring attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import otil_xdit
from otil_xdit.exchange.communicator import OtilCommunicator
from tests.support.dits.case import Degrees


@dataclass(frozen=True)
class Exchange:
    """A way of exchanging keys and values between patches.

    Attributes:
        active: a context in which xDiT exchanges this way.
        flags: what it adds to xDiT's command line.
        shares: of the patches.
    """

    active: Callable[[], AbstractContextManager[None]]
    flags: Callable[[Degrees], list[str]]
    shares: Callable[[Degrees], tuple[int, ...]] = lambda degrees: ()


def ring_flags(degrees: Degrees) -> list[str]:
    return ["--ring_degree", str(degrees.patch)]


def plugin_flags(degrees: Degrees) -> list[str]:
    return ["--parallel", "sync", "--patch_degree", str(degrees.patch)] if degrees.patch > 1 else []


def falling_shares(degrees: Degrees) -> tuple[int, ...]:
    """3:2 for two patches, 4:3:2 for three."""
    return tuple(range(degrees.patch + 1, 1, -1))


def unequal_flags(degrees: Degrees) -> list[str]:
    return [*plugin_flags(degrees), "--patch_shares", ",".join(map(str, falling_shares(degrees)))]


def stages_flags(*more: str) -> Callable[[Degrees], list[str]]:
    def flags(degrees: Degrees) -> list[str]:
        return ["--parallel", "hybridiff", "--patch_degree", str(degrees.patch), *more]

    return flags


@contextmanager
def plugin() -> Iterator[None]:
    otil_xdit.register()
    yield


@contextmanager
def silent() -> Iterator[None]:
    """The plugin, with this rank's keys and values in the place of the others'."""
    otil_xdit.register()

    def gather(self: OtilCommunicator, name: str, *own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part.repeat(1, 1, self.group.world_size, 1) for part in own)

    with patch.object(OtilCommunicator, "gather", gather):
        yield


@contextmanager
def attending_to(exchanged: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """One attention call, to what `exchanged` makes of this rank's keys and values, in the place of xDiT's ring."""
    from xfuser.core.distributed.runtime_state import RuntimeState
    from xfuser.model_executor.layers import usp

    def ring_attn(attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
        joint = options.pop("joint_attn_kwargs", None)
        # One call replaces the whole ring, so it is the first step ("front" text) and the last one ("rear" text).
        joint = None if joint is None else {**joint, "step": 0, "total_steps": 1}
        return attention(query, exchanged(key), exchanged(value), joint_attn_kwargs=joint, **options)[0]

    check = "_check_if_backend_compatible_with_current_configuration"
    with patch.object(usp, "ring_attn", ring_attn), patch.object(RuntimeState, check, lambda *arguments: None):
        yield


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) of this rank -> (B, H, S of all patches, D)."""
    from yunchang.globals import PROCESS_GROUP

    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(PROCESS_GROUP.RING_PG.size())]
    dist.all_gather(parts, tensor, group=PROCESS_GROUP.RING_PG)
    return torch.cat(parts, dim=2)


EXCHANGES = {
    "plugin": Exchange(plugin, plugin_flags),
    "gather": Exchange(partial(attending_to, _gathered), ring_flags),
    "closed": Exchange(plugin, stages_flags("--otil_window_steps", "0")),
    "stages": Exchange(plugin, stages_flags("--otil_window", "1:2")),
    "none": Exchange(silent, plugin_flags),
    "unequal": Exchange(plugin, unequal_flags, falling_shares),
    "unequal, none": Exchange(silent, unequal_flags, falling_shares),
}
"""`gather` is the plainest exact exchange, to tell what xDiT gets wrong from what the plugin does; `none` exchanges
nothing, and must not pass for exact; `closed` and `stages` are Hybridiff without and with a step in two stages;
`unequal` gives each patch fewer tokens than the one before."""
