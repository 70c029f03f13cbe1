"""Copies that every rank computes by itself, and cards that may round differently.

With a codec or a prediction each rank works out what all others hold, so the same arithmetic must give the same bits
everywhere. Cards of one compute capability run the same compiled kernels, and do. Of others nothing promises it: so
they are refused, before weights load where one host has them and before the first step otherwise, unless the copies
are compared while they are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from otil_xdit.method.config import OtilConfig

_WAY_OUT = "give cards of one kind, --otil_check, which compares the copies at every layer, or --parallel distrifusion"

CAPABILITY = f"the GPU's compute capability ({_WAY_OUT})"
"""The fact that ranks with such copies are compared by."""


def facts_of_card(config: Any) -> dict[str, str]:
    """Return this rank's compute capability, as a fact by name, where it must be every rank's; nothing on the CPU."""
    return {CAPABILITY: capability_of(None)} if must_be_alike(config) and torch.cuda.is_available() else {}


def check_cards(config: Any, processes: int) -> None:
    """Check the cards that this host's ranks have.

    Args:
        config: the strategy's.
        processes: number of ranks on this host; each has a card, in turn.

    Raises:
        ValueError: naming the cards that are not alike, and what would be accepted.
    """
    if not (must_be_alike(config) and torch.cuda.is_available()):
        return
    found = [capability_of(number) for number in range(min(processes, torch.cuda.device_count()))]
    if len(set(found)) > 1:
        raise ValueError(f"the cards of this host differ: {_listed(found)}; {_WAY_OUT}")


def capability_of(device: int | None) -> str:
    """Return a card's compute capability, say "8.9"; of None, the current one's."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def must_be_alike(config: Any) -> bool:
    """Tell whether ranks under a strategy's configuration need cards of one compute capability."""
    return isinstance(config, OtilConfig) and config.computes_copies and not config.check


def _listed(found: Sequence[str]) -> str:
    return ", ".join(f"{torch.cuda.get_device_name(number)} with {one}" for number, one in enumerate(found))
