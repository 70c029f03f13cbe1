"""What `otil-xdit bench` compares, as frozen data, and the parsing of it; all is checked before any process starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from otil_xdit.catalog.folders import OWN, Model
from otil_xdit.catalog.schedulers import SCHEDULERS
from otil_xdit.tools.common.variants import Variant, check_guidance, parse_variant
from otil_xdit.xdit.flags.degrees import check_at_least

Peer = Literal["one-process", "cfg", "ulysses", "ring", "pipefusion"]
"""What this package's strategies are compared with: plain diffusers, CFG parallelism alone, xDiT's own for DiTs."""

ALONE: Peer = "one-process"

PEERS: dict[Peer, str] = {
    ALONE: "plain diffusers",
    "cfg": "the passes with and without the prompt on two ranks, and nothing else",
    "ulysses": "xDiT's, for DiTs",
    "ring": "xDiT's, for DiTs",
    "pipefusion": "xDiT's, for DiTs",
}

DEFAULT = (
    "one-process",
    "naive",
    "sync",
    "distrifusion",
    "otil-paper",
    "otil",
    "hybridiff",
    "cfg",
    "ulysses",
    "ring",
    "pipefusion",
)

DEGREES = ("patch", "cfg", "ulysses", "ring", "pipefusion")
"""Ways to share an image; their degrees multiply to the number of ranks."""

CFG_RANKS = 2


@dataclass(frozen=True)
class Strategy:
    """One way to make an image: a variant of this package's strategies, or a peer where the variant is None."""

    text: str
    variant: Variant | None = None

    @property
    def label(self) -> str:
        """The row's name."""
        return self.text.replace(ALONE, "one process")

    @property
    def settings(self) -> dict[str, Any] | None:
        """All settings by name; None for a peer."""
        return None if self.variant is None else self.variant.settings

    def ranks(self, ranks: int) -> int:
        """Return how many of a cell's ranks it uses."""
        return 1 if self.text == ALONE else ranks

    def degrees(self, ranks: int) -> dict[str, int]:
        """Return how so many ranks share the image, by `DEGREES`."""
        if self.variant is not None:
            patches = self.variant.patches(ranks)
            used = {"patch": patches, "cfg": CFG_RANKS if self.variant.requires_cfg_parallel else 1}
        else:
            used = {self.text: self.ranks(ranks)}
        return {name: used.get(name, 1) for name in DEGREES}

    def obstacle(self, model: Model, ranks: int, steps: int, guidance: float) -> str | None:
        """Return why it cannot run on so many ranks, as far as that is known without trying, or None."""
        if self.variant is not None:
            try:
                self.variant.check_ranks(ranks)
                self.variant.check_call(steps, guidance)
            except ValueError as error:
                return str(error)
        if self.text == "cfg" and guidance <= 1:
            return "without guidance there is only one pass"
        if self.text == "cfg" and ranks != CFG_RANKS:
            return f"two passes have {CFG_RANKS} ranks, not {ranks}"
        if self.text in ("ulysses", "ring", "pipefusion") and model.is_unet:
            return "xDiT has it for DiTs only"
        return None


@dataclass(frozen=True)
class Cell:
    """Strategies are compared within a cell: one model, of one width, at one size, on one number of ranks.

    Attributes:
        model: what is known of it.
        width: times its channels, with random weights; 1 for the model as it is.
        size: height and width of the image, in pixels.
        ranks: that share the image.
    """

    model: Model
    width: int
    size: int
    ranks: int

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of the latent."""
        return (self.size // self.model.vae,) * 2

    def __str__(self) -> str:
        wide = f", {self.width} times as wide" if self.width > 1 else ""
        return f"{self.model.label}{wide}, {self.size} x {self.size}, {self.ranks} ranks"


@dataclass(frozen=True)
class Plan:
    """Everything that is to be run.

    Attributes:
        models, sizes, ranks: their product is the cells. A cell of more than one rank has the strategies that use one,
            too, so 1 among several numbers of ranks adds nothing.
        latents: sides of the latent; where there are any, they take the place of `sizes`.
        strategies: compared in every cell, in the order of the rows.
        width: times the channels of every model.
        steps: denoising steps of an image.
        sampler: of U-Nets; DiTs have their own.
        guidance: scale of classifier-free guidance.
        rounds: images of every strategy that count.
        warmup_rounds: images before them that do not.
        limit: seconds that loading, or an image, may take.

    Raises:
        ValueError: naming the flag, its value and what would be accepted.
    """

    models: tuple[Model, ...]
    strategies: tuple[Strategy, ...]
    ranks: tuple[int, ...] = (2,)
    sizes: tuple[int, ...] = (128,)
    latents: tuple[int, ...] = ()
    width: int = 1
    steps: int = 15
    sampler: str = "dpm-solver"
    guidance: float = 7.5
    rounds: int = 7
    warmup_rounds: int = 1
    limit: float = 600.0

    def __post_init__(self) -> None:
        self._check_numbers()
        for model in self.models:
            check_guidance(model, self.guidance)
        if not list(self.cells):
            raise ValueError(f"--ranks 1: only {ALONE} runs on one rank; add it to --strategies, or give 2 or more")
        for cell in self.cells:
            for strategy in self.strategies_of(cell):
                self._check_strategy(strategy, cell)

    def _check_strategy(self, strategy: Strategy, cell: Cell) -> None:
        if strategy.variant is None:
            return
        obstacle = strategy.obstacle(cell.model, cell.ranks, self.steps, self.guidance)
        if obstacle is None:
            cell.model.check_size(cell.size, strategy.variant.patches(cell.ranks), strategy.variant.block)
        elif strategy.text not in DEFAULT:  # those are left out with the reason beside the others' figures
            raise ValueError(f"--strategies {strategy.text}: {obstacle}")

    def _check_numbers(self) -> None:
        for name, least in {"width": 1, "steps": 1, "rounds": 1, "warmup_rounds": 0}.items():
            check_at_least(name, getattr(self, name), least)
        for ranks in self.ranks:
            check_at_least("ranks", ranks, 1)
        for side in self.latents:
            check_at_least("latent", side, 1)
        if not self.limit > 0:
            raise ValueError(f"--limit {self.limit:g}: give a number of seconds above 0")
        if self.sampler not in (OWN, *SCHEDULERS):
            known = ", ".join((OWN, *SCHEDULERS))
            raise ValueError(f"--sampler {self.sampler}: no such sampler; choose from {known}")

    @property
    def cells(self) -> Iterator[Cell]:
        """Models, sizes and numbers of ranks; of 1 rank only where there is no other."""
        alone = any(strategy.text == ALONE for strategy in self.strategies)
        several = [ranks for ranks in self.ranks if ranks > 1]
        for model in self.models:
            for size in self.sizes_of(model):
                for ranks in several or ([1] if alone else []):
                    yield Cell(model, self.width, size, ranks)

    def sizes_of(self, model: Model) -> tuple[int, ...]:
        """Return heights and widths of a model's images, in pixels."""
        return tuple(side * model.vae for side in self.latents) or self.sizes

    def strategies_of(self, cell: Cell) -> tuple[Strategy, ...]:
        """Return the strategies that run on a cell's ranks."""
        return tuple(strategy for strategy in self.strategies if cell.ranks > 1 or strategy.text == ALONE)

    def sampler_of(self, model: Model) -> str:
        """Return the sampler that makes a model's images."""
        return self.sampler if model.is_unet else OWN


def parse_strategy(text: str) -> Strategy:
    """Parse a strategy from the name of a peer, or from ``PRESET[:setting=value,...]``.

    Raises:
        ValueError: naming what would be accepted.
    """
    if text in PEERS:
        return Strategy(text)
    return Strategy(text, parse_variant(text, "--strategies", f", or from {', '.join(PEERS)}"))
