"""What the layers of a network on patches may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from otil_xdit.exchange.halo import HaloRows
from otil_xdit.exchange.report import Report
from otil_xdit.method.coordinates import AttentionWeights
from otil_xdit.method.grid import TokenLayout
from otil_xdit.method.schedule import Clock


class Communicator(Protocol):
    """What a strategy puts between the patches; `otil_xdit.exchange.communicator.OtilCommunicator` documents each
    method."""

    clock: Clock

    def begin(self) -> None: ...
    def end(self) -> None: ...
    def free(self) -> None: ...
    def set_weights(self, layers: Mapping[str, AttentionWeights]) -> str: ...
    def observe(self, latent: torch.Tensor | None, layout: TokenLayout) -> None: ...
    def gather(self, name: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def halo(
        self, name: str, x: torch.Tensor, above: int, below: int, precomputed: HaloRows | None = None
    ) -> torch.Tensor: ...
    def room_for(self, name: str, x: torch.Tensor, above: int, below: int) -> torch.Tensor: ...
    def moments(
        self, name: str, mean: torch.Tensor, var: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    def norm_halo(
        self,
        names: tuple[str, str],
        mean: torch.Tensor,
        var: torch.Tensor,
        share: torch.Tensor,
        x: torch.Tensor,
        above: int,
        below: int,
    ) -> tuple[torch.Tensor, torch.Tensor, HaloRows] | None: ...
    def collect(self, part: torch.Tensor, kind: str = "output") -> torch.Tensor: ...
    def count(self, part: torch.Tensor, kind: str) -> None: ...
    def report(self) -> Report: ...
