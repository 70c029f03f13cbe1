"""Links between ranks: by name, by rate and latency, or to be shaped; and the parsing of ``--link``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Link:
    """What joins the ranks.

    Attributes:
        name: as the user gave it.
        rate: bytes a second that a rank sends, and receives at the same time.
        latency: seconds of a collective of hardly any bytes.
        samples: bytes and seconds of single messages where they were measured, both ascending: a message that nothing
            else travels beside may not reach the rate, and a small one may pass faster.
        swapping: how many times as long an all-to-all takes as another message of as many bytes.
    """

    name: str
    rate: float
    latency: float
    samples: tuple[tuple[float, float], ...] = ()
    swapping: float = 1.0

    def seconds(self, nbytes: float) -> float:
        """Return the seconds of one message that puts `nbytes` on the wire while nothing else travels."""
        if not self.samples:
            return self.latency + nbytes / self.rate
        least, least_seconds = self.samples[0]
        if nbytes <= least:
            return least_seconds
        for (size, seconds), (next_size, next_seconds) in pairwise(self.samples):
            if nbytes <= next_size:
                return seconds + (next_seconds - seconds) * (nbytes - size) / (next_size - size)
        most, most_seconds = self.samples[-1]
        return most_seconds * nbytes / most


_GIGA, _MICRO = 1e9, 1e-6

_PCIE_LATENCY = 42 * _MICRO
"""An all-reduce of 8 bytes on 8 RTX 4090s, nccl-tests: 42 us (github.com/NVIDIA/nccl, issue 1530)."""

_TCP_LATENCY = 46 * _MICRO
"""A broadcast of 8 bytes between two hosts over TCP, nccl-tests: 46 us (github.com/NVIDIA/nccl-tests, issue 82)."""

_ETHERNET_SHARE = 1448 / 1538
"""TCP's payload in a full Ethernet frame: 1500 - 52 bytes of headers; with preamble and gap 1538 are on the wire."""

LINKS = {
    link.name: link
    for link in (
        # Bus bandwidth of nccl-tests on 8 A100-SXM4: about 200 GB/s (github.com/NVIDIA/nccl-tests, issue 149). No
        # figure found for the latency: that of PCIe is taken.
        Link("nvlink", 200 * _GIGA, _PCIE_LATENCY),
        # 16 GT/s x 16 lanes x 128/130 / 8 = 31.5 GB/s on the wire; 4 RTX 4090s with P2P reach 22 GB/s of bus bandwidth
        # in nccl-tests, and 18 through host memory (github.com/NVIDIA/nccl, issue 1603).
        Link("pcie4-x16", 22 * _GIGA, _PCIE_LATENCY),
        # Half of those 18: 8 lanes, and no P2P.
        Link("pcie4-x8-host", 9 * _GIGA, _PCIE_LATENCY),
        Link("10gbe", 1.25 * _GIGA * _ETHERNET_SHARE, _TCP_LATENCY),
        Link("1gbe", 0.125 * _GIGA * _ETHERNET_SHARE, _TCP_LATENCY),
    )
}
"""Named links. An all-gather's bus bandwidth is what a rank receives a second, which is what the model wants."""

_RATES = {"gb/s": 1e9, "mb/s": 1e6, "kb/s": 1e3, "gbit/s": 1e9 / 8, "mbit/s": 1e6 / 8}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}

SHAPED_RATES = {"kB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9, "kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8}
"""Bytes per second of the units that a link to be shaped is given in."""

LEAST_RATE = 10e3


@dataclass(frozen=True)
class LinkRequest:
    """A link that is to be shaped; one of the two is given.

    Attributes:
        text: as given.
        rate: bytes per second in each direction of each rank's cable.
        ratio: how long the keys and values of a synchronous step shall take, in computing times of a step.
    """

    text: str
    rate: float | None = None
    ratio: float | None = None


def parse_link(text: str) -> Link:
    """Parse a name in `LINKS`, or ``RATE[,LATENCY]`` such as ``12GB/s,20us``; without latency 0.

    Raises:
        ValueError: naming the flag, the value and what would be accepted.
    """
    if text in LINKS:
        return LINKS[text]
    rate, _, latency = text.lower().partition(",")
    found = _quantity(rate, _RATES), _quantity(latency, _TIMES) if latency else 0.0
    if found[0] is None or found[1] is None or found[0] == 0:
        raise ValueError(
            f"--link {text}: give {', '.join(LINKS)}, or RATE[,LATENCY] such as 12GB/s,20us "
            f"({', '.join(_RATES)}; {', '.join(_TIMES)}; of a rate more than 0)"
        )
    return Link(text, found[0], found[1])


def parse_shaped_link(text: str) -> LinkRequest:
    """Parse ``20MB/s``, ``1gbit`` or ``ratio=2``.

    Raises:
        ValueError: naming what would be accepted.
    """
    is_ratio = text.startswith("ratio=")
    value = _quantity(text.removeprefix("ratio="), {"": 1.0} if is_ratio else SHAPED_RATES)
    if value is None:
        accepted = f"give a rate in {', '.join(SHAPED_RATES)}, say 20MB/s, or ratio=R, say ratio=2"
        raise ValueError(f"--link {text}: {accepted}")
    if is_ratio and value == 0:
        raise ValueError(f"--link {text}: give a ratio above 0")
    if not is_ratio and value < LEAST_RATE:
        raise ValueError(f"--link {text}: give at least {LEAST_RATE / 1e3:g}kB/s")
    return LinkRequest(text, ratio=value) if is_ratio else LinkRequest(text, rate=value)


def _quantity(text: str, units: Mapping[str, float]) -> float | None:
    """Return a number with one of `units` behind it, in the unit that those are factors of; None for anything else."""
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)([A-Za-z/]*)", text.strip())
    if match is None or match[2] not in units:
        return None
    try:
        value = float(match[1]) * units[match[2]]
    except ValueError:
        return None
    return value if math.isfinite(value) else None
