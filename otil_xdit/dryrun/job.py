"""What a dry run is asked about: one denoising step, the ranks that share it, and what one rank does in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from otil_xdit.dryrun.networks import Network
from otil_xdit.dryrun.recorder import Message
from otil_xdit.networks.dit.token_cut import TokenCut

Request = tuple[str, tuple[Any, ...]]
"""A method of the communicator, and the arguments that it is called with."""


@dataclass(frozen=True)
class ParallelDegrees:
    """How many ranks share the two passes of guidance, the attention heads, and the rows.

    `shares` are those of the patches, in any unit; empty for equal ones. `speeds` are those of the patches' cards,
    of which one process has the fastest: 1 for that; empty where they are as the shares.
    """

    cfg: int = 1
    ulysses: int = 1
    patches: int = 1
    shares: tuple[int, ...] = ()
    speeds: tuple[float, ...] = ()

    @property
    def cut(self) -> TokenCut:
        """Return who has which rows, or tokens of a DiT."""
        return TokenCut(self.rows, self.ulysses, self.shares)

    @property
    def rows(self) -> int:
        """Number of ranks that share the rows of one pass: patches x Ulysses."""
        return self.patches * self.ulysses

    @property
    def ranks(self) -> int:
        """Number of ranks that work on an image."""
        return self.cfg * self.rows

    def __str__(self) -> str:
        parts = {"cfg": self.cfg, "ulysses": self.ulysses, "patch": self.patches}
        shown = " x ".join(f"{name} {degree}" for name, degree in parts.items() if degree > 1) or "one process"
        return f"{shown} ({':'.join(map(str, self.shares))})" if self.shares else shown


@dataclass(frozen=True)
class Job:
    """One denoising step of an image.

    Attributes:
        network: without weights.
        height, width: in pixels.
        batch: images in one pass, those without the prompt included.
        dtype: of the network.
        text: text tokens in a pass.
        with_both: whether `batch` is half with and half without the prompt, where the network is guided that way.
    """

    network: Network
    height: int
    width: int
    batch: int
    dtype: torch.dtype
    text: int
    with_both: bool = True

    @property
    def is_guided(self) -> bool:
        """Tell whether each step computes with and without the prompt."""
        return self.with_both and self.network.batch == 2 and self.batch % 2 == 0

    @property
    def latent(self) -> tuple[int, int]:
        """Rows and columns of the latent."""
        return self.height // self.network.vae, self.width // self.network.vae

    def cast_network(self) -> Any:
        """Return the network, its weights of the job's dtype."""
        # diffusers' own `to` warns of layers that it would keep in float32.
        return nn.Module.to(self.network.module, self.dtype)

    def cast_controls(self) -> list[Any]:
        """Return the ControlNets, their weights of the job's dtype."""
        return [nn.Module.to(control, self.dtype) for control in self.network.controls.values()]

    def batch_of_rank(self, degrees: ParallelDegrees) -> int:
        """Return the images that a rank computes: one CFG group's, or all where they cannot be shared evenly."""
        return self.batch // degrees.cfg if self.batch % degrees.cfg == 0 else self.batch


@dataclass(frozen=True, eq=False)
class Pass:
    """What one rank does in a call of the network.

    Attributes:
        requests: of its layers, in order.
        messages: those that xDiT sends by itself (Ulysses' all-to-alls; with a DiT what joins the passes of guidance,
            and packed tokens), which no communicator counts.
        launches: kernels of everything but the exchange, where they were counted.
    """

    requests: list[Request]
    messages: list[Message]
    launches: int = 0
