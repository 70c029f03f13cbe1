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
        cls,
        cards: int,
        *,
        ranks: int | None,
        models: list[str] | None,
        images: int | None,
        steps: int,
        rounds: int,
        timeout: float,
    ) -> Settings:
        """Return the settings of a machine with so many cards; None stands for its default.

        Raises:
            ValueError: naming the flag, its value and what is accepted.
        """
        names = models or [*BUILDERS] * (cards > 0) or ["tiny-sd", "tiny-dit"]
        settings = cls(
            cards=cards,
            ranks=max(2, cards) if ranks is None else ranks,
            models=tuple(dict.fromkeys(names)),
            images=(100 if cards else 3) if images is None else images,
            steps=steps,
            rounds=rounds,
            timeout=timeout,
        )
        settings.check()
        return settings

    def check(self) -> None:
        """Refuse what cannot be run.

        Raises:
            ValueError: naming the flag, its value and what is accepted.
        """
        least = {"ranks": 2, "images": 1, "steps": LEAST_STEPS, "rounds": 1}
        for flag, value in least.items():
            check_at_least(flag, getattr(self, flag), value)
        most = max(2, self.cards)
        if self.cards and self.ranks > most:
            have = f"this machine has {self.cards} card{'s' * (self.cards > 1)}"
            raise ValueError(f"--ranks {self.ranks}: {have}; give {'2' if most == 2 else f'2 to {most}'}")
        for name in self.models:
            if name not in (*BUNDLED, *BUILDERS):
                raise ValueError(f"--models {name}: no such model; choose from {', '.join((*BUNDLED, *BUILDERS))}")
        if not LEAST_SECONDS <= self.timeout < float("inf"):
            raise ValueError(f"--timeout {self.timeout:g}: give {LEAST_SECONDS:g} seconds or more")
