"""`generation`: the bracket round a denoising loop that is not the pipeline's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from otil_xdit.method.checks import check_integer
from otil_xdit.runtime.session import PatchSession
from otil_xdit.xdit.plugin.sessions import session_of

_PLANNED = "_num_timesteps"
"""Attribute in which diffusers' pipelines say how many steps they will do."""


class Generation:
    """A denoising loop under way.

    Args:
        session: the pipeline's; None for one that exchanges nothing.
    """

    def __init__(self, session: PatchSession | None) -> None:
        self._session = session

    def tick(self, latent: torch.Tensor | None = None) -> None:
        """End a step, in a loop that does not call the `step` of the pipeline's scheduler, which does so by itself.

        Args:
            latent: what the step began with, [B, C, H, W]; ``hybridiff`` wants it where it looks for its window.
        """
        if self._session is not None:
            self._session.cfg_controller.end_step(latent)
            self._session.communicator.clock.tick()


@contextmanager
def generation(pipe: Any, steps: int | None = None) -> Iterator[Generation]:
    """Bracket a denoising loop of your own: within it the pipeline's network works on patches.

    Every rank enters it with the same arguments, calls ``pipe.unet`` (or the transformer of a pipeline that xDiT does
    not wrap) with the whole latent under ``torch.no_grad()``, and steps ``pipe.scheduler``, or calls `Generation.tick`.

    Args:
        pipe: what `parallelize` returned.
        steps: the number of steps; None where the scheduler's timesteps say it, or nobody knows. A strategy whose first
            part waits for the other ranks needs it to know where that part ends.

    Yields:
        The generation; on one rank one whose `tick` does nothing.

    Raises:
        ValueError: for `steps` below 1, and on all ranks, when one of them refuses the networks or they do not agree.
        ExchangeTimeout: when another rank fails or does not answer.
    """
    if steps is not None:
        check_integer("steps", steps, 1)
    session = session_of(pipe)
    if session is None:
        yield Generation(None)
        return
    before = vars(pipe).pop(_PLANNED, None)  # of the pipeline's own last call
    try:
        with session.generation(pipe):
            session.communicator.clock.total = steps
            if steps is not None:
                vars(pipe)[_PLANNED] = steps
            yield Generation(session)
    finally:
        vars(pipe).pop(_PLANNED, None)
        if before is not None:
            vars(pipe)[_PLANNED] = before
