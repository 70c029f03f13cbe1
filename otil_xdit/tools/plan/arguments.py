"""What the flags of `otil-xdit plan` say by themselves: checked before what plans is imported, which takes seconds."""

from __future__ import annotations

import argparse

from otil_xdit.catalog.models import published_networks
from otil_xdit.method.kernels import has_triton
from otil_xdit.tools.common.cards import Card, find_cards, joined
from otil_xdit.tools.common.links import parse_link
from otil_xdit.xdit.flags.degrees import check_at_least
from otil_xdit.xdit.flags.options import AUTO


def check_arguments(arguments: argparse.Namespace) -> None:
    """Check what is asked to be planned, as far as the flags alone tell.

    Raises:
        ValueError: naming flag, value and what would be accepted.
    """
    if arguments.model is None:
        raise ValueError(f"--model is missing; give {', '.join(published_networks())}, a shipped model, or a folder")
    for flag, least in (("gpus", 2), ("steps", 1), ("images", 1), ("text_tokens", 1), ("ulysses_degree", 1)):
        value = getattr(arguments, flag)
        if value is None and flag == "gpus":
            raise ValueError("--gpus is missing; give a whole number from 2 up")
        if value is not None:
            check_at_least(flag, value, least)
    for flag in ("step_time", "flops"):
        value = getattr(arguments, flag)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{flag} {value:g}; give a number above 0")
    if arguments.step_time is not None and arguments.flops is not None:
        raise ValueError(f"--step_time {arguments.step_time:g} and --flops {arguments.flops:g}; give one of them")
    if arguments.size is not None and (arguments.height or arguments.width):
        raise ValueError(f"--size {arguments.size} and --height or --width contradict each other; give one of them")
    card = card_of(arguments)
    if card is not None and arguments.machine is not None:
        raise ValueError(
            f"--card {arguments.card} and --machine {arguments.machine} contradict each other: a fitted machine has "
            "the exchange's own work in it; give one of them"
        )
    if card is not None and not has_triton():
        raise ValueError(f"--card {arguments.card} needs Triton, whose kernels are counted; pip install triton")
    if card is not None and arguments.dtype == "float32":
        raise ValueError(f"--card {arguments.card}, --dtype float32: give float16 or bfloat16, whose rate is known")
    rates_of(arguments)
    if arguments.link is not None:
        parse_link(arguments.link)


def cards_of(arguments: argparse.Namespace) -> tuple[Card, ...]:
    """Return the cards of --card; none where it is not given."""
    return () if arguments.card is None else find_cards(arguments.card)


def card_of(arguments: argparse.Namespace) -> Card | None:
    """Return what stands for the cards of --card; None where it is not given."""
    cards = cards_of(arguments)
    return joined(cards) if cards else None


def rates_of(arguments: argparse.Namespace) -> tuple[float, ...]:
    """Return the rate of each rank's card where --card names unequal ones; empty otherwise.

    Raises:
        ValueError: for another number of cards than of ranks, or shares that nothing tells.
    """
    cards = cards_of(arguments)
    if len(cards) > 1 and len(cards) != arguments.gpus:
        raise ValueError(f"--card {arguments.card} has {len(cards)} cards for {arguments.gpus} ranks; give one or all")
    if arguments.patch_shares == AUTO and len(cards) < 2:
        raise ValueError("--patch_shares auto: give --card with one card for each rank, such as 4090,3090")
    return tuple(card.reached for card in cards) if len(cards) > 1 else ()


def cards_differ(arguments: argparse.Namespace) -> bool:
    """Tell whether --card names cards of different compute capability."""
    return len({card.capability for card in cards_of(arguments)}) > 1
