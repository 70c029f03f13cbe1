"""An exchange without other processes: every other rank sends what this one sends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from otil_xdit.comm.collectives import Collectives
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.comm.host_copies import Transfer
from otil_xdit.dryrun.job import ParallelDegrees
from otil_xdit.dryrun.stand_ins import OwnPass, unet_groups
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.grid import TokenLayout
from otil_xdit.networks.unet.model import PatchedUNet


class LoopedCollectives(Collectives):
    """Messages arrive at once, and hold what this rank sends; zeros where it sends nothing of that size."""

    def _waits_on_host(self) -> bool:
        return True

    def _start_gather(self, payload: torch.Tensor, output: torch.Tensor) -> list[dist.Work]:
        output.view(self.group.world_size, -1).copy_(payload)
        return []

    def _start_transfers(self, receives: list[Transfer], sends: list[Transfer]) -> list[dist.Work]:
        for _, received, _ in receives:
            alike = (sent for _, sent, _ in sends if sent.numel() == received.numel())
            received.view(-1).copy_(next(alike, torch.zeros_like(received)).view(-1))
        return []


class LoopedSession:
    """A session of one rank of several, without a pipeline: its steps are ticked by hand.

    Args:
        config: the settings.
        patches, rank: number of ranks, and which this one is.
    """

    def __init__(self, config: OtilConfig, patches: int = 2, rank: int = 0) -> None:
        nobody: Any = None
        self.communicator = OtilCommunicator(config, PatchGroup(nobody, rank, patches), LoopedCollectives)
        self.cfg_controller = OwnPass()
        self.is_active = True
        self.groups = unet_groups(ParallelDegrees(patches=patches), rank)
        self._layer, self._kept_keys = "", None

    def patched(self, network: Any, holders: Iterable[Any] = ()) -> PatchedUNet:
        """Return the network on patches, ready for a generation."""
        unet = PatchedUNet(self, network, self.groups, self._attend)
        unet.prepare(holders)
        return unet

    @contextmanager
    def attention(self, name: str, layout: TokenLayout, kept_keys: torch.Tensor | None) -> Iterator[None]:
        """See `otil_xdit.runtime.session.PatchSession.attention`."""
        self.communicator.observe(None, layout)
        self._layer, self._kept_keys = name, kept_keys
        yield

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = self.communicator.gather(self._layer, key, value)
        if self._kept_keys is not None:
            key, value = key[:, :, self._kept_keys], value[:, :, self._kept_keys]
        return functional.scaled_dot_product_attention(query, key, value)
