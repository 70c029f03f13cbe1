"""`StageRole`: one rank's part in two stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from otil_xdit.comm.collectives import Collectives


@dataclass(frozen=True)
class StageRole:
    """One rank's part in two stages.

    Attributes:
        is_second: whether it computes the second segment, and belongs to the CFG group with the prompt.
        peer: the rank with the same rows in the other CFG group, by its place among the ranks of the image.
        collectives: of those ranks.
        sum_over_ranks: returns the sum over all of them of an int64 tensor, on every rank.
    """

    is_second: bool
    peer: int
    collectives: Collectives
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]
