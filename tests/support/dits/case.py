"""What a case of the zoo is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Degrees:
    """How the ranks are shared out; their product is the world size."""

    patch: int = 1
    ulysses: int = 1
    cfg: int = 1

    @property
    def world_size(self) -> int:
        return self.patch * self.ulysses * self.cfg

    def __str__(self) -> str:
        parts = {"ulysses": self.ulysses, "cfg": self.cfg, "patch": self.patch}
        return " x ".join(f"{name} {degree}" for name, degree in parts.items() if degree > 1) or "one rank"


@dataclass(frozen=True)
class Case:
    """One architecture: a tiny pipeline and the way xDiT runs it.

    Attributes:
        name: of the case.
        build: makes the pipeline, with the same weights each time.
        embeds: makes the prompt embeddings and masks that the pipeline is called with, the same each time.
        call: further arguments of the pipeline's call.
        runner: the model's name in xDiT's registry, for the models that have a runner.
        wrapper: the name of xDiT's pipeline wrapper in `xfuser`, for the others.
        network: finds xDiT's class of the network, for those without a pipeline (`tests.support.dits.networks`).
        runner_flags: further flags of xDiT's command line.
        edits: whether it is given an image.
        cfg: whether xDiT has CFG parallelism for it.
        prepare: called before xDiT loads the pipeline, where xDiT cannot load or call one so small without help.
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    embeds: Callable[[], dict[str, Any]]
    call: dict[str, Any] = field(default_factory=dict)
    runner: str | None = None
    wrapper: str | None = None
    network: Callable[[], type] | None = None
    runner_flags: tuple[str, ...] = ()
    edits: bool = False
    cfg: bool = False
    prepare: Callable[[], None] = lambda: None

    @property
    def is_loaded(self) -> bool:
        """Whether only Python's call can run it, as xDiT does not load it."""
        return not (self.runner or self.wrapper or self.network)

    def arguments(self) -> dict[str, Any]:
        """All arguments of one call of the pipeline."""
        generator = torch.Generator().manual_seed(7)
        return {"prompt": None, **self.call, **self.embeds(), "generator": generator, "output_type": "latent"}
