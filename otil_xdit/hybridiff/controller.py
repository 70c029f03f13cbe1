"""`CfgController`: the passes with and without the prompt: what they tell, and who computes them.

It shows a generation's predictions to `Guidance` and their discrepancy to `Window`, and puts networks in two `Stages`
where the settings want that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from otil_xdit.comm.collectives import Collectives
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.exchange.protocol import Communicator
from otil_xdit.hybridiff.guidance import Guidance
from otil_xdit.hybridiff.role import StageRole
from otil_xdit.hybridiff.stages import Stages
from otil_xdit.method.config import NO_GUIDANCE, OtilConfig
from otil_xdit.method.schedule import Clock
from otil_xdit.method.window import Window

Collect = Callable[[torch.Tensor, str], torch.Tensor]
"""Gives a tensor of every rank that works on the image, [N, ...], and counts what is sent."""


class CfgController:
    """The two passes of one pipeline.

    Args:
        config: the settings.
        clock: of the steps; it is listened to.
        window: the steps in which the networks may be in two stages; it is told the discrepancy of each step.
        collectives: of all ranks that work on the image.
        collect: see `Collect`.
    """

    def __init__(
        self, config: OtilConfig, clock: Clock, window: Window, collectives: Collectives | None, collect: Collect
    ) -> None:
        self._config, self._clock, self.window = config, clock, window
        self._collectives, self._collect = collectives, collect
        self.guidance = Guidance(config.window_guidance)
        self.curve: list[float | None] = []
        """The denoising discrepancy of each step of the generation that is done."""
        self._stages: dict[int, tuple[nn.Module, Stages]] = {}
        clock.after_step.append(self._after_step)

    @classmethod
    def of(cls, communicator: Communicator) -> CfgController:
        """Return the controller of a communicator's steps; one that is no `OtilCommunicator` has no window."""
        if isinstance(communicator, OtilCommunicator):
            config, window = communicator.config, communicator.window
            return cls(config, communicator.clock, window, communicator.replica_collectives, communicator.collect)
        config = OtilConfig()
        return cls(config, communicator.clock, Window(config.window_settings), None, communicator.collect)

    # ---- a generation --------------------------------------------------------------------------------------------

    def check_call(self, arguments: Mapping[str, Any]) -> None:
        """Look at the arguments of a pipeline's call, by name.

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
        self.drain()
        self.guidance.begin()
        self.curve = []

    def settle(self, sample: Any) -> None:
        """All predictions of a step are there; `sample` is the latent that the scheduler is about to step."""
        self.guidance.settle(sample if isinstance(sample, torch.Tensor) else None)

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

    def predicted(self, whole: torch.Tensor) -> torch.Tensor:
        """A U-Net's whole prediction, [B, C, H, W] or [2 B, C, H, W]; what is to be used as such comes back."""
        if self.guidance.is_wanted and whole.shape[0] % 2 == 0:
            return cast(torch.Tensor, self.gathered(whole, 0))
        self.guidance.note(whole)
        return whole

    def gathered(self, shown: torch.Tensor | list[torch.Tensor], dim: int) -> Any:
        """What the two CFG groups of ranks have shown each other, first that of the group without the prompt.

        Args:
            shown: each group's, or both joined along `dim`; what is to be used as such comes back.
        """
        if isinstance(shown, list):
            return [*self.guidance.pair(*shown)]
        return torch.cat(self.guidance.pair(*shown.chunk(2, dim)), dim)

    # ---- two stages ----------------------------------------------------------------------------------------------

    def join(
        self, network: nn.Module, name: str, blocks: Sequence[nn.Module], is_second: bool, peer: int, needs_prompt: bool
    ) -> None:
        """Put a network in two stages.

        Args:
            network: the denoising network.
            name: of it, for messages.
            blocks: its blocks, in any order.
            is_second: whether this rank computes the second stage, and is one with the prompt.
            peer: the rank with the same rows in the other half, by its place among the ranks of the image.
            needs_prompt: as in `Stages`.

        Raises:
            ValueError: for a compiled network, whose blocks are not called one by one.
        """
        if getattr(network, "_compiled_call_impl", None) is not None:
            raise ValueError(f"--parallel hybridiff does not support the compiled {name}: give the one that it was")
        assert self._collectives is not None, "two stages are two ranks"
        self.guidance.is_wanted = True

        def sum_over_ranks(counts: torch.Tensor) -> torch.Tensor:
            return self._collect(counts, "stages").sum(0)

        role = StageRole(is_second, peer, self._collectives, sum_over_ranks)
        self._stages[id(network)] = network, Stages(name, blocks, role, needs_prompt)

    @property
    def has_stages(self) -> bool:
        """Whether the settings want networks in two stages."""
        return self._config.requires_cfg_parallel

    def stages_of(self, network: nn.Module) -> Stages | None:
        """The network's two stages; None for a network that is not cut."""
        return self._stages.get(id(network), (None, None))[1]

    def is_staged(self, network: nn.Module) -> bool:
        """Whether the call of `network` that is about to be made is one in two stages."""
        stages, step = self.stages_of(network), self._clock.step
        staged = stages is not None and self.window.holds(step) and stages.can_run_staged(step)
        self.guidance.is_staged = staged
        return staged

    def call(self, network: nn.Module, call: Callable[[Any], Any], inputs: Any) -> Any:
        """A network's call, after `is_staged` has been asked.

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

    def forget(self, kept: set[int]) -> list[nn.Module]:
        """Undo `join` for all networks but those whose `id` is in `kept`; those for which that was to be done."""
        gone = [self._stages.pop(key) for key in [*self._stages] if key not in kept]
        for _, stages in gone:
            stages.release()
        return [network for network, _ in gone]

    def drain(self) -> None:
        """Wait for what is under way."""
        for _, stages in self._stages.values():
            stages.wait()

    @property
    def nbytes(self) -> int:
        """Of the buffers."""
        return sum(stages.nbytes for _, stages in self._stages.values())
