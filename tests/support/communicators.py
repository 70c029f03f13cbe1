"""The communicator of tests that start no ranks: the dry run's, which also counts generations and knows a whole map."""

from __future__ import annotations

import torch
from torch.nn import functional

from otil_xdit.dryrun.job import ParallelDegrees
from otil_xdit.dryrun.stand_ins import RecordingCommunicator
from otil_xdit.exchange.halo import HaloRows


class FakeCommunicator(RecordingCommunicator):
    """Records requests as a dry run does, and what a session does with it.

    Args:
        patches: number of ranks, each with a patch.
        rank: this one.

    Attributes:
        begun, ended: number of generations.
        gathered: step and layer of every request for keys and values.
    """

    def __init__(self, patches: int = 2, rank: int = 0) -> None:
        super().__init__(ParallelDegrees(patches=patches), rank)
        self.begun = self.ended = 0
        self.gathered: list[tuple[int, str]] = []

    def begin(self) -> None:
        """Start a generation."""
        self.clock.reset()
        self.begun += 1

    def end(self) -> None:
        """End a generation."""
        self.ended += 1

    def gather(self, name: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Record the step besides; see `RecordingCommunicator.gather`."""
        self.gathered.append((self.clock.step, name))
        return super().gather(name, key, value)


class WholeMapCommunicator(FakeCommunicator):
    """Answers a layer as the other ranks would, from a map that is known as a whole.

    Args:
        whole: the map that the layer is given, [B, C, H, W].
        rows: those of it that this rank holds.
        patches, rank: as of `FakeCommunicator`.
    """

    def __init__(self, whole: torch.Tensor, rows: slice, patches: int, rank: int) -> None:
        super().__init__(patches, rank)
        self.whole, self.rows = whole, rows

    def halo(
        self, name: str, x: torch.Tensor, above: int, below: int, precomputed: HaloRows | None = None
    ) -> torch.Tensor:
        """Return the rows [B, C, above + h + below, W] of the map, zeros beyond its edge."""
        padded = functional.pad(self.whole, (0, 0, above, below))
        return padded[:, :, self.rows.start : self.rows.stop + above + below]

    def moments(
        self, name: str, mean: torch.Tensor, var: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and population variance of the whole map, float32 [B, groups]."""
        groups = self.whole.unflatten(1, (mean.shape[1], -1)).float()
        whole_var, whole_mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0)
        return whole_mean, whole_var
