"""Stand-ins for what a dry run has not: other ranks, a session, the controller of guidance's passes.

They follow the protocols that the run's own objects follow (`otil_xdit.exchange.protocol.Communicator`,
`otil_xdit.networks.unet.model.SessionProtocol`), so the run's own code can be called with them.

Shapes: N ranks, B batch, C channels, h rows of this rank, W columns, S tokens of this rank, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from otil_xdit.comm.groups import PatchGroup, UnetGroups
from otil_xdit.dryrun.job import ParallelDegrees, Request
from otil_xdit.dryrun.recorder import Log, RecordedCollectives
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.exchange.halo import HaloRows
from otil_xdit.exchange.protocol import Communicator
from otil_xdit.exchange.report import Report
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.coordinates import AttentionWeights
from otil_xdit.method.grid import TokenLayout
from otil_xdit.method.schedule import Clock
from otil_xdit.networks.unet.model import PassProtocol

NO_PROCESS_GROUP: Any = None
"""In the place of a process group, on which a dry run starts nothing."""


class RecordingCommunicator:
    """Writes down the requests of layers and answers with tensors of the right shapes.

    Args:
        degrees: of the ranks.
        place: this rank's, from the top of the image, among those that share the rows.

    Attributes:
        requests: all of them, in order.
        neighbours_rows: how many times a norm was given the rows of a neighbour for its convolution.
    """

    def __init__(self, degrees: ParallelDegrees, place: int) -> None:
        self.requests: list[Request] = []
        self.neighbours_rows = 0
        self.clock = Clock()
        self._degrees = degrees
        self._place = place

    def begin(self) -> None:
        """Do nothing: there is no generation."""

    def end(self) -> None:
        """Do nothing: nothing is under way."""

    def free(self) -> None:
        """Do nothing: there are no buffers."""

    def set_weights(self, layers: Mapping[str, AttentionWeights]) -> str:
        """Do nothing: weights change no request."""
        return ""

    def observe(self, latent: torch.Tensor | None, layout: TokenLayout) -> None:
        """Record the layout of the tokens that the next requests are of."""
        self.requests.append(("observe", (latent, layout)))

    def gather(self, name: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's keys and values, [B, heads, S, d], as if they were everybody's."""
        self.requests.append(("gather", (name, key, value)))
        return key, value

    def halo(
        self, name: str, x: torch.Tensor, above: int, below: int, precomputed: HaloRows | None = None
    ) -> torch.Tensor:
        """Return an empty [B, C, above + h + below, W]."""
        self.requests.append(("halo", (name, x, above, below)))
        return x.new_empty(*x.shape[:2], above + x.shape[2] + below, x.shape[3])

    def room_for(self, name: str, x: torch.Tensor, above: int, below: int) -> torch.Tensor:
        """Return a part of an empty [B, C, above + h + below, W]."""
        self.requests.append(("room_for", (name, x, above, below)))
        wide = x.new_empty(*x.shape[:2], above + x.shape[2] + below, x.shape[3])
        return wide[:, :, above : above + x.shape[2]]

    def moments(
        self, name: str, mean: torch.Tensor, var: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's moments as if they were the whole map's."""
        self.requests.append(("moments", (name, mean, var, share)))
        return mean, var

    def norm_halo(
        self,
        names: tuple[str, str],
        mean: torch.Tensor,
        var: torch.Tensor,
        share: torch.Tensor,
        x: torch.Tensor,
        above: int,
        below: int,
    ) -> tuple[torch.Tensor, torch.Tensor, HaloRows]:
        """Return this rank's moments, and rows of its own in the place of its neighbours'."""
        self.requests.append(("norm_halo", (names, mean, var, share, x, above, below)))
        last = self._degrees.rows - 1
        rows = (x[:, :, :above] if self._place > 0 else None, x[:, :, :below] if self._place < last else None)
        self.neighbours_rows += sum(one is not None for one in rows)
        return mean, var, rows

    def collect(self, part: torch.Tensor, kind: str = "output") -> torch.Tensor:
        """Return an empty [N, ...]."""
        self.requests.append(("collect", (part, kind)))
        return part.new_empty(self._degrees.ranks, *part.shape)

    def count(self, part: torch.Tensor, kind: str) -> None:
        """Record what xDiT sends by itself."""
        self.requests.append(("count", (part, kind)))

    def report(self) -> Report:
        """Raise: a recorder counts nothing; `otil_xdit.dryrun.requests.replay` has requests counted."""
        raise NotImplementedError("requests are counted where they are replayed")


class OwnPass:
    """Stands for `CfgController` where a rank computes its own pass alone.

    Args:
        calls_blocks: whether other steps are in two stages, for which ControlNets compute both passes at every step.
    """

    def __init__(self, calls_blocks: bool = False) -> None:
        self.calls_blocks = calls_blocks

    def begin_call(self, network: Any) -> bool:
        """Say that no call is computed in two stages."""
        return False

    def call(self, network: Any, call: Callable[[Any], Any], inputs: Any) -> Any:
        """Make the network's call as it is."""
        return call(inputs)

    def record_prediction(self, prediction: torch.Tensor) -> torch.Tensor:
        """Return the prediction as it is."""
        return prediction


class DryRunSession:
    """Stands for a `PatchSession` that is always generating.

    Args:
        communicator: of the U-Net's layers.
        calls_blocks: as of `OwnPass`.

    Attributes:
        layer: name of the attention layer whose call is under way.
        kept_keys: positions of that layer's real keys; None where none are padding.
    """

    is_active = True

    def __init__(self, communicator: RecordingCommunicator, calls_blocks: bool = False) -> None:
        self.communicator: Communicator = communicator
        self.cfg_controller: PassProtocol = OwnPass(calls_blocks)
        self.layer = ""
        self.kept_keys: torch.Tensor | None = None

    @contextmanager
    def attention(self, name: str, layout: TokenLayout, kept_keys: torch.Tensor | None) -> Iterator[None]:
        """Enter the attention call of a layer; see `otil_xdit.runtime.session.PatchSession.attention`."""
        self.communicator.observe(None, layout)
        self.layer, self.kept_keys = name, kept_keys
        yield


def dry_communicator(config: OtilConfig, degrees: ParallelDegrees, place: int, log: Log) -> OtilCommunicator:
    """Return the run's own communicator on collectives that send nothing.

    Args:
        config: the settings.
        degrees, place: as for `patch_group`.
        log: where the messages go.
    """
    return OtilCommunicator(config, patch_group(degrees, place), partial(RecordedCollectives, log=log))


def patch_group(degrees: ParallelDegrees, place: int) -> PatchGroup:
    """Return the group of the patches that a rank belongs to, without process groups.

    Args:
        degrees: of the ranks.
        place: the rank's, from the top of the image, among those that share the rows.
    """
    rows = PatchGroup(NO_PROCESS_GROUP, place, degrees.rows)
    replica = PatchGroup(NO_PROCESS_GROUP, place, degrees.ranks)
    passes = PatchGroup(NO_PROCESS_GROUP, 0, degrees.cfg)
    patch = place // degrees.ulysses
    return PatchGroup(NO_PROCESS_GROUP, patch, degrees.patches, degrees.ulysses, rows, replica, passes)


def unet_groups(degrees: ParallelDegrees, place: int) -> UnetGroups:
    """Return the ranks that share a U-Net, without process groups; arguments as for `patch_group`."""
    places = tuple((cfg_rank, row) for cfg_rank in range(degrees.cfg) for row in range(degrees.rows))
    rows = PatchGroup(NO_PROCESS_GROUP, place, degrees.rows)
    return UnetGroups(rows, degrees.ulysses, degrees.cfg, 0, places, degrees.cut.rank_shares)
