"""What `otil-xdit check` does on a machine: defaults by device, and which values are refused before ranks start."""

from __future__ import annotations

from dataclasses import dataclass

from otil_xdit.catalog.bundled import BUNDLED
from otil_xdit.method.config import OtilConfig
from otil_xdit.tools.check.random_pipes import BUILDERS
from otil_xdit.xdit.flags.degrees import check_at_least

LEAST_STEPS = OtilConfig().warmup_steps + 3
"""Of an image: some after the warm-up."""

LEAST_SECONDS = 5.0
"""Of a timeout: ranks that are all right are this late now and then."""


@dataclass(frozen=True)
class Settings:
    """What is checked.

    Attributes:
        cards: this machine's CUDA devices.
        ranks: processes; on one card two, which share it.
        models: whose steps are timed.
        images: drawn twice.
        steps: of every image.
        rounds: images of each strategy that are timed.
        timeout: seconds after which a rank that says nothing counts as failed.
    """

    cards: int
    ranks: int
    models: tuple[str, ...]
    images: int
    steps: int
    rounds: int
    timeout: float

    @property
    def shares_card(self) -> bool:
        """Tell whether all ranks are on one card."""
        return self.cards == 1

    @classmethod
    def of(
        cls, cards: int, ranks: int | None, models: list[str] | None, images: int | None, **others: float
    ) -> Settings:
        """Return the settings of a machine with so many cards; None stands for its default.

        Raises:
            ValueError: naming the flag, its value and what is accepted.
        """
        ranks = max(2, cards) if ranks is None else ranks
        names = tuple(dict.fromkeys(models or (("SDXL", "FLUX") if cards else ("tiny-sd", "tiny-dit"))))
        images = (100 if cards else 3) if images is None else images
        steps, rounds, timeout = int(others["steps"]), int(others["rounds"]), others["timeout"]
        check_at_least("ranks", ranks, 2)
        if cards and ranks > max(2, cards):
            raise ValueError(
                f"--ranks {ranks}: this machine has {cards} card{'s' * (cards > 1)}; give 2 to {max(2, cards)}"
            )
        for name in names:
            if name not in (*BUNDLED, *BUILDERS):
                raise ValueError(f"--models {name}: choose from {', '.join((*BUNDLED, *BUILDERS))}")
        check_at_least("images", images, 1)
        check_at_least("steps", steps, LEAST_STEPS)
        check_at_least("rounds", rounds, 1)
        if not LEAST_SECONDS <= timeout < float("inf"):
            raise ValueError(f"--timeout {timeout:g}; give {LEAST_SECONDS:g} or more")
        return cls(cards, ranks, names, images, steps, rounds, timeout)
