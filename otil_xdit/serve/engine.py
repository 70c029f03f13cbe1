"""`Engine`: what the app asks of whatever makes images: the ranks (`otil_xdit.serve.rank_engine`), or a stand-in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from otil_xdit.serve.requests import DrawnImage, ImageRequest, ModelFacts, StepDone

State = Literal["loading", "ready", "restarting", "failed", "stopped"]
"""Of an engine: its first start; images can be made; started again after a loss; given up; told to stop."""


@dataclass(frozen=True)
class EngineStatus:
    """Where an engine is.

    Attributes:
        state: see `State`.
        reason: why it is not ready: the rank that was lost, and the layer; empty where there is nothing to say.
        restarts: how often its ranks were started again.
    """

    state: State
    reason: str = ""
    restarts: int = 0


class EngineFailure(Exception):
    """The image is lost, because the ranks failed; the message says which one and where."""


class Refused(Exception):
    """The model cannot make this image; nothing is broken."""


class Cancelled(Exception):
    """The image was cancelled between two steps."""


class Engine(Protocol):
    """Makes images, one call of `draw` at a time."""

    @property
    def status(self) -> EngineStatus:
        """Return where it is."""

    @property
    def facts(self) -> ModelFacts | None:
        """Return what is known of the model; None until it has been loaded."""

    async def start(self) -> None:
        """Begin to load, and return without waiting for it."""

    async def wait_until_ready(self) -> None:
        """Wait until images can be made.

        Raises:
            EngineFailure: when they never will.
        """

    async def draw(self, requests: Sequence[ImageRequest], on_step: Callable[[StepDone], None]) -> list[DrawnImage]:
        """Make one image, or several in one call of the pipeline where only prompts and seeds differ.

        Args:
            on_step: called after each step.

        Raises:
            Refused, Cancelled, EngineFailure: see there.
        """

    def cancel(self) -> None:
        """Let the image under way end between two steps: `draw` raises `Cancelled`. Nothing happens without one."""

    async def stop(self) -> None:
        """End all processes."""
