"""A model's record: everything that is known of it before its weights load, in one place.

`otil_xdit.catalog.unets` and `otil_xdit.catalog.dits` hold the records, `otil_xdit.catalog.models` finds them by name.
Sizes are in image pixels; a latent pixel is `vae` x `vae` of them, and a token `patch` x `patch` latent pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["exact", "refused", "untested"]
"""What happens under ``--parallel``. "exact": a tiny network of the architecture, with random weights, gave the latents
of plain diffusers (float32, gloo, ``--parallel sync``; 2 and 4 patches, 2 x 2 with Ulysses, and 2 x 2 with CFG
parallelism where xDiT has it); docs/supported-models.md has the measurements."""


@dataclass(frozen=True)
class NetworkConfig:
    """The published configuration of a denoising network, from which it can be built without weights.

    Attributes:
        kind: its class in diffusers.
        label: what `otil-xdit plan` and `memory` call it.
        settings: its configuration, as far as it is not that class's defaults.
        passes: images in one pass for each image that is made: 2 with classifier-free guidance, 1 where that is
            distilled into the network.
        text_tokens: text tokens in one pass, unless the user says otherwise.
    """

    kind: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    passes: int = 2
    text_tokens: int = 77


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """What is known of one model.

    Attributes:
        names: what ``--model`` takes. A name with an owner is a repository of the hub.
        state: what happens under ``--parallel``.
        note: the conditions, or the reason of a refusal.
        has_runner: whether xfuser's command line runs it; otherwise it runs in a script.
        vae: image pixels of a latent pixel, per side; 0 where the geometry is not known.
        patch: latent pixels of a token, per side; 1 for a U-Net.
        height, width: default size, in image pixels.
        network: its published configuration, for the tools that build it without weights; None where they do not.
    """

    names: tuple[str, ...]
    state: State = "untested"
    note: str = ""
    has_runner: bool = True
    vae: int = 0
    patch: int = 1
    height: int = 0
    width: int = 0
    network: NetworkConfig | None = None

    @property
    def label(self) -> str:
        return self.names[0]

    @property
    def short_names(self) -> tuple[str, ...]:
        """The names without their owners, in lower case."""
        return tuple(dict.fromkeys(map(short_name, self.names)))

    def is_named(self, model: str) -> bool:
        """Return whether `model`, a value of ``--model``, names this model."""
        return short_name(model) in self.short_names

    def refusal(self) -> str | None:
        """Return why the model does not run under ``--parallel``, or None where it does."""
        return self.note if self.state == "refused" else None


def short_name(model: str) -> str:
    """Return a model's name without its owner, in lower case."""
    return model.rsplit("/", 1)[-1].lower()
