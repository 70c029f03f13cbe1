"""xDiT's flow-match scheduler, without its two waits of the host a step.

Its `step` compares the present sigma with bounds, in Python. Its sigmas are on the network's device, so each comparison
waits for all that the device has been given. On the CPU they are as good: a step takes single numbers of them.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

from otil_xdit.runtime.session import PatchSession


def hook_flow_match() -> None:
    """Keep the sigmas of xDiT's flow-match scheduler on the CPU while a session generates."""
    from xfuser.model_executor.schedulers.scheduling_flow_match_euler_discrete import (
        xFuserFlowMatchEulerDiscreteSchedulerWrapper as Wrapper,
    )

    step = Wrapper.step

    @wraps(step)
    def step_on_host(self: Any, *args: Any, **kwargs: Any) -> Any:
        sigmas = self.sigmas
        if PatchSession.active() is not None and isinstance(sigmas, torch.Tensor) and sigmas.device.type != "cpu":
            self.sigmas = sigmas.cpu()  # once an image: `set_timesteps` makes new ones
        return step(self, *args, **kwargs)

    Wrapper.step = step_on_host
