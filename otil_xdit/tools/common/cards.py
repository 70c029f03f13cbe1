"""Cards by name: what a prediction needs to know of them, from the vendor's data sheets; nothing was measured here.

All figures but the L20's follow from a card's multiprocessors, clock and memory (`tests/tools/test_plan.py`), and those
of A100, H100 and H200 stand alike where others quote the data sheets (looked up on 2026-11-27; the A100's in
glennklockwood.com/garden). NVIDIA's sheets themselves were not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_TERA, _GIGA, _MICRO = 1e12, 1e9, 1e-6

REACHED = 0.5
"""Share of the data sheet's operations a second that a denoising network reaches; an estimate. FLUX.1-dev at 1024 takes
6.71 s for 28 steps on an H100 (xDiT's README, eager), which is about half; SDXL on a 4090 is near it, too."""

_DESKTOP_LAUNCH, _SERVER_LAUNCH = 6 * _MICRO, 5 * _MICRO
"""What the host needs for an operator of eager PyTorch, Python included; estimates: of a process of its own on a fast
core 5 to 6 us are usual. It is the host's figure rather than the card's."""


@dataclass(frozen=True)
class Card:
    """One type of GPU.

    Attributes:
        name: as ``--card`` takes it.
        capability: compute capability (NVIDIA, CUDA GPUs); cards of different ones may round differently.
        peak: operations a second of its tensor cores in float16 and bfloat16, added up in float32, without sparsity.
        memory_rate: bytes a second of its memory.
        launch: seconds that the host needs to launch a kernel.
        source: where `peak` and `memory_rate` are from.
    """

    name: str
    capability: str
    peak: float
    memory_rate: float
    launch: float
    source: str

    @property
    def reached(self) -> float:
        """Return the operations a second that a network is taken to reach."""
        return REACHED * self.peak


def _card(name: str, capability: str, tera: float, giga: float, launch: float, source: str) -> Card:
    return Card(name, capability, tera * _TERA, giga * _GIGA, launch, source)


CARDS = {
    card.name: card
    for card in (
        _card("3090", "8.6", 71.0, 936, _DESKTOP_LAUNCH, "NVIDIA, Ampere GA102 whitepaper, GeForce RTX 3090"),
        _card("4090", "8.9", 165.2, 1008, _DESKTOP_LAUNCH, "NVIDIA, Ada architecture whitepaper, GeForce RTX 4090"),
        _card(
            "5090",
            "12.0",
            209.5,
            1792,
            _DESKTOP_LAUNCH,
            "NVIDIA, RTX Blackwell architecture whitepaper, GeForce RTX 5090",
        ),
        _card("A6000", "8.6", 154.8, 768, _DESKTOP_LAUNCH, "NVIDIA, RTX A6000 data sheet: 309.7 with sparsity"),
        _card("L20", "8.9", 119.5, 864, _SERVER_LAUNCH, "estimate: a third of the L40S's rate, as was reported"),
        _card("L40S", "8.9", 362.05, 864, _SERVER_LAUNCH, "NVIDIA, L40S data sheet"),
        _card("A100", "8.0", 312, 2039, _SERVER_LAUNCH, "NVIDIA, A100 data sheet, 80 GB SXM"),
        _card("H100", "9.0", 989.4, 3350, _SERVER_LAUNCH, "NVIDIA, H100 data sheet, SXM: 1,979 with sparsity"),
        _card("H200", "9.0", 989.4, 4800, _SERVER_LAUNCH, "NVIDIA, H200 data sheet, SXM: 1,979 with sparsity"),
        _card(
            "RTX-PRO-6000",
            "12.0",
            503.8,
            1792,
            _DESKTOP_LAUNCH,
            "NVIDIA, RTX PRO Blackwell whitepaper, workstation edition",
        ),
    )
}


def find_card(name: str) -> Card:
    """Return a card by its name, in whatever case.

    Raises:
        ValueError: naming what is accepted.
    """
    wanted = _plain(name)
    found = next((card for known, card in CARDS.items() if _plain(known) == wanted), None)
    if found is None:
        raise ValueError(f"--card {name}: give {', '.join(CARDS)}; of another card --flops or --step_time")
    return found


def find_cards(names: str) -> tuple[Card, ...]:
    """Return the cards of names that commas part; see `find_card`."""
    return tuple(map(find_card, names.split(",")))


def joined(cards: Sequence[Card]) -> Card:
    """Return what stands for cards that work on one image: the fastest one's peak, and what the slowest wait for."""
    if len(set(cards)) == 1:
        return cards[0]
    return Card(
        ", ".join(card.name for card in cards),
        ", ".join(sorted({card.capability for card in cards})),
        max(card.peak for card in cards),
        min(card.memory_rate for card in cards),
        max(card.launch for card in cards),
        "; ".join(dict.fromkeys(card.source for card in cards)),
    )


def _plain(name: str) -> str:
    """Return a name without what people leave out: case, spaces, ``RTX``."""
    return name.lower().replace(" ", "-").removeprefix("rtx-")
