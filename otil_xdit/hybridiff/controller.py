"""`CfgController`: the passes with and without the prompt: what they tell, and who computes them.

It shows a generation's predictions to `Guidance` and their discrepancy to `Window`, and puts networks in two stages
(`StagedNetworks`) where the settings want that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from otil_xdit.comm.groups import PatchGroup, UnetGroups
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.exchange.protocol import Communicator
from otil_xdit.hybridiff.forward_hooks import Inputs
from otil_xdit.hybridiff.guidance import Guidance
from otil_xdit.hybridiff.staged_networks import StagedNetworks
from otil_xdit.hybridiff.stages import Stages
from otil_xdit.method.config import NO_GUIDANCE, OtilConfig
from otil_xdit.method.window import Window
from otil_xdit.networks.unet.model import is_unet


class CfgController:
    """The two passes of one pipeline.

    Args:
        communicator: of its session; one that is no `OtilCommunicator` has no window and no stages.
        group: the ranks that hold the patches.
        groups: the CFG groups; None where no network is shared out by them.
        is_active: whether a generation of the session is under way.

    Attributes:
        window: the steps in which the networks may be in two stages; it is told the discrepancy of each step.
        guidance: what the predictions tell.
        curve: the denoising discrepancy of each step of the last generation; None where it was not measured.
    """

    def __init__(
        self, communicator: Communicator, group: PatchGroup, groups: UnetGroups | None, is_active: Callable[[], bool]
    ) -> None:
        self._clock, self._collect, self._is_active = communicator.clock, communicator.collect, is_active
        self._rows, self._groups = group.rows or group, groups
        self._config, collectives = OtilConfig(), None
        self.window = Window(self._config.window_settings)
        if isinstance(communicator, OtilCommunicator):
            self._config, collectives = communicator.config, communicator.replica_collectives
            self.window = communicator.window
        self.guidance = Guidance(self._config.window_guidance)
        self.curve: list[float | None] = []
        self._staged: StagedNetworks | None = None
        if self._config.requires_cfg_parallel and groups is not None and groups.cfg_degree == 2:
            assert collectives is not None, "two stages are two ranks"
            self._staged = StagedNetworks(groups, collectives, communicator.collect, self._call_network)
            self.guidance.is_wanted = True
        communicator.clock.after_step.append(self._after_step)

    # ---- a generation --------------------------------------------------------------------------------------------

    def check_call(self, arguments: Mapping[str, Any]) -> None:
        """Validate the arguments of a pipeline's call, by name.

        Raises:
            ValueError: for a window outside the steps, or a call that is known not to be guided.
        """
        steps = arguments.get("num_inference_steps")
        counted = isinstance(steps, int) and arguments.get("timesteps") is None and arguments.get("sigmas") is None
        name = "true_cfg_scale" if "true_cfg_scale" in arguments else "guidance_scale"
        scale = arguments.get(name)
        self._config.check_call(steps if counted else None, scale if isinstance(scale, (int, float)) else None, name)

    def begin(self) -> None:
        """Forget an earlier generation; the communicator, which owns the window, begins that."""
        self.wait()
        self.guidance.begin()
        self.curve = []

    def begin_networks(self, networks: Mapping[str, nn.Module], state_of: Callable[[str, nn.Module], object]) -> None:
        """Begin a generation of a pipeline's networks, and put them in two stages where the settings want that.

        Args:
            networks: by attribute of the pipeline.
            state_of: returns what else than the inputs' shapes says what a network's blocks cost (LoRA).

        Raises:
            ValueError: for a network that cannot be in two stages.
        """
        self.guidance.has_parts = self._rows.world_size > 1 and not any(map(is_unet, networks.values()))
        for name, network in networks.items():
            self.window.is_unet = is_unet(network)
            if self._staged is not None:
                self._staged.begin(name, network, state_of(name, network))

    def end_step(self, sample: Any) -> None:
        """Evaluate the predictions of a step, which are all there.

        Args:
            sample: the latent that the scheduler is about to step, [B, C, ...].
        """
        self.guidance.end_step(sample if isinstance(sample, torch.Tensor) else None)

    def _after_step(self, step: int, is_last: bool) -> None:
        """Tell the window of a step; after the last one find the curve."""
        if is_last:
            self.curve = self.guidance.curve(self._share if self.guidance.has_parts else None)
            return
        total = self._clock.total
        if step == 0 and total is not None:
            self._config.window_settings.check(total)
        if self._config.needs_guidance and not self.guidance.is_guided:
            raise ValueError(f"this call makes one prediction a step, or two in a way that is not known; {NO_GUIDANCE}")
        if self.window.is_looked_for:
            self.window.record(step, self.guidance.discrepancy(self._share), total)

    def _share(self, part: torch.Tensor) -> torch.Tensor:
        return self._collect(part, "discrepancy")

    # ---- predictions ---------------------------------------------------------------------------------------------

    def record_prediction(self, prediction: torch.Tensor) -> torch.Tensor:
        """Record a U-Net's whole prediction, and return the one to use in its place.

        Args:
            prediction: [B, C, H, W] of one pass, or [2 B, C, H, W] of both, first that without the prompt.
        """
        if self.guidance.is_wanted and prediction.shape[0] % 2 == 0:
            return cast(torch.Tensor, self.record_gathered(prediction, 0))
        self.guidance.record(prediction)
        return prediction

    def record_own(self, prediction: torch.Tensor) -> None:
        """Record a DiT's prediction, [B, ...] or [2 B, ...]; with CFG groups `record_gathered` records both."""
        if self._groups is None or self._groups.cfg_degree == 1:
            self.guidance.record(prediction)

    def record_gathered(self, predictions: torch.Tensor | list[torch.Tensor], dim: int) -> Any:
        """Record the predictions of both CFG groups, and return those to use in their place.

        Args:
            predictions: each group's, or both joined along `dim`; first that of the group without the prompt.
        """
        if isinstance(predictions, list):
            return [*self.guidance.record_pair(*predictions)]
        return torch.cat(self.guidance.record_pair(*predictions.chunk(2, dim)), dim)

    # ---- two stages ----------------------------------------------------------------------------------------------

    @property
    def calls_blocks(self) -> bool:
        """Tell whether networks may be put in two stages, whose blocks are called one by one."""
        return self._staged is not None

    def begin_call(self, network: nn.Module) -> bool:
        """Begin a call of a network, and return whether it is made in two stages."""
        stages, step = self.stages_of(network), self._clock.step
        self.guidance.is_staged = stages is not None and self.window.holds(step) and stages.can_run_staged(step)
        return self.guidance.is_staged

    def call(self, network: nn.Module, call: Callable[[Any], Any], inputs: Any) -> Any:
        """Make the call of a network that `begin_call` has begun.

        Args:
            call: makes it.
            inputs: what it is made with, if nothing else is better.
        """
        stages = self.stages_of(network)
        if stages is None:
            return call(inputs)
        step, total = self._clock.step, self._clock.total
        goes_on = self.window.holds(step + 1) and step + 1 != total
        if self.guidance.is_staged:
            return stages.run_staged(call, inputs, step, goes_on)
        return stages.run_whole(call, inputs, step, goes_on or self.window.may_begin_at(step + 1, total))

    def stages_of(self, network: nn.Module) -> Stages | None:
        """Return the network's two stages; None for a network that is not in two stages."""
        return None if self._staged is None else self._staged.stages_of(network)

    def keep_only(self, kept: set[int]) -> None:
        """Give all networks but those whose `id` is in `kept` their own calls back."""
        if self._staged is not None:
            self._staged.keep_only(kept)

    def wait(self) -> None:
        """Wait for what is under way."""
        if self._staged is not None:
            self._staged.wait()

    @property
    def nbytes(self) -> int:
        """Return the bytes of the buffers."""
        return 0 if self._staged is None else self._staged.nbytes

    def _call_network(self, network: nn.Module, forward: Callable[[Inputs], Any], inputs: Inputs) -> Any:
        """Call a DiT: as it is outside the session's generations."""
        if not self._is_active():
            return forward(inputs)
        self.begin_call(network)
        return self.call(network, forward, inputs)
