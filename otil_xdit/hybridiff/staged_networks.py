"""`StagedNetworks`: the denoising networks of one pipeline that are in two stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from otil_xdit.catalog.models import architectures
from otil_xdit.comm.collectives import Collectives
from otil_xdit.comm.groups import UnetGroups
from otil_xdit.hybridiff.forward_hooks import ForwardHooks, Inputs
from otil_xdit.hybridiff.role import StageRole
from otil_xdit.hybridiff.stages import Stages
from otil_xdit.networks.dit.architectures import architecture_of
from otil_xdit.networks.dit.layer_names import blocks_of as dit_blocks
from otil_xdit.networks.unet.levels import blocks_of as unet_blocks
from otil_xdit.networks.unet.model import is_unet

Collect = Callable[[torch.Tensor, str], torch.Tensor]
"""Returns a tensor of every rank that works on the image, [N, ...], and counts what is sent under the name given."""

CallNetwork = Callable[[nn.Module, Callable[[Inputs], Any], Inputs], Any]
"""Calls a network: gets it, its own `forward` and the inputs, and returns what stands for its output."""


@dataclass(frozen=True)
class _Staged:
    network: nn.Module
    stages: Stages
    hooks: ForwardHooks | None


class StagedNetworks:
    """Networks in two stages, from their first generation until `keep_only` lets them go.

    Args:
        groups: the CFG groups, two of them.
        collectives: of all ranks that work on the image.
        collect: see `Collect`.
        call_network: calls a DiT in place of its own `forward`; a patched U-Net asks by itself.
    """

    def __init__(
        self, groups: UnetGroups, collectives: Collectives, collect: Collect, call_network: CallNetwork
    ) -> None:
        self._groups, self._collect, self._call_network = groups, collect, call_network
        self._role = StageRole(groups.cfg_rank == 1, groups.peer, collectives, self._sum_over_ranks)
        self._staged: dict[int, _Staged] = {}

    def begin(self, name: str, network: nn.Module, state: object) -> None:
        """Begin a generation of a network, which is put in two stages where it is not.

        Args:
            name: the network's, for messages.
            state: see `Stages.begin`.
        """
        if id(network) not in self._staged:
            self._staged[id(network)] = self._split(name, network)
        self._staged[id(network)].stages.begin(state)

    def stages_of(self, network: nn.Module) -> Stages | None:
        """Return a network's two stages; None for a network that is not in two stages."""
        staged = self._staged.get(id(network))
        return None if staged is None else staged.stages

    def keep_only(self, kept: set[int]) -> None:
        """Give all networks but those whose `id` is in `kept` their own calls back."""
        for key in [key for key in self._staged if key not in kept]:
            staged = self._staged.pop(key)
            staged.stages.release()
            if staged.hooks is not None:
                staged.hooks.release()

    def wait(self) -> None:
        """Wait for what is under way."""
        for staged in self._staged.values():
            staged.stages.wait()

    @property
    def nbytes(self) -> int:
        """Return the bytes of the buffers."""
        return sum(staged.stages.nbytes for staged in self._staged.values())

    def _split(self, name: str, network: nn.Module) -> _Staged:
        if is_unet(network):
            # Both passes of a U-Net come in one batch, so each CFG group has the prompt.
            return _Staged(network, Stages(name, unet_blocks(network), self._role, needs_prompt=False), None)

        def call_network(number: int, forward: Callable[[Inputs], Any], inputs: Inputs) -> Any:
            return self._call_network(network, forward, inputs)

        stages = Stages(name, dit_blocks(network), self._role, needs_prompt=True)
        return _Staged(network, stages, ForwardHooks([network], call_network))

    def _sum_over_ranks(self, counts: torch.Tensor) -> torch.Tensor:
        return self._collect(counts, "stages").sum(0)


def check_stages(network: nn.Module) -> None:
    """Check that a DiT has been compared in two stages with one process.

    Raises:
        ValueError: naming those that have.
    """
    if not architecture_of(network).stages:
        kind = getattr(network, "module_type", type(network)).__name__
        known = ", ".join(name for name, facts in architectures().items() if facts.stages)
        raise ValueError(
            f"--parallel hybridiff has not been compared with one process for {kind}; it has for U-Nets and {known}. "
            "Choose another strategy, with --use_cfg_parallel where the model has it"
        )
