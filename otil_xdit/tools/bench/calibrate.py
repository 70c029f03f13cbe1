"""What the shaped link really gives: all-gathers of several sizes, timed on the ranks, and a line through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from otil_xdit.tools.bench.link import Namespaces
from otil_xdit.tools.bench.tasks import GatherTask
from otil_xdit.tools.common.jobs import Jobs

SIZES = tuple(4**power << 10 for power in range(7))
"""Payloads of one rank, in bytes: 1 KiB to 4 MiB."""

LONGEST_SECONDS = 0.5
"""Sizes that would take longer at the nominal rate are left out, but for the first three."""

REPEATS = 9

CLOSE = 0.05
"""How far from the wished rate a link may be, as a share of it."""

ATTEMPTS = 4

FIRST_GUESS = 0.8
"""Share of a shaped rate that collectives are expected to reach, before it is known."""


@dataclass(frozen=True)
class Link:
    """A shaped link and what an all-gather takes on it; field names are those of the JSON.

    Attributes:
        kind: how it is shaped.
        asked: what the user asked for.
        rate_bytes: nominal rate of each direction of each rank's cable, bytes per second.
        samples: payload bytes of one rank, and seconds of an all-gather: median, on the slowest rank.
        alpha_seconds, beta_bytes_per_second: of the line seconds = alpha + bytes / beta.
        ratio: where one was asked for, how long the keys and values of a synchronous step take at beta, in computing
            times of a step.
    """

    kind: str
    asked: str
    rate_bytes: float
    samples: tuple[tuple[int, float], ...]
    alpha_seconds: float
    beta_bytes_per_second: float
    ratio: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit(samples: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Alpha and beta of seconds = alpha + bytes / beta by least squares of the relative errors; alpha is not negative.

    Relative, because the samples span orders of magnitude, and small messages matter as much as large ones.
    """
    weights = [1 / seconds for _, seconds in samples]
    sizes = [size * weight for (size, _), weight in zip(samples, weights, strict=True)]
    ww, ws, ss = (sum(a * b for a, b in zip(x, y, strict=True)) for x, y in _pairs(weights, sizes))
    w, s = sum(weights), sum(sizes)  # the right-hand side is 1 for every sample
    determinant = ww * ss - ws * ws
    alpha = (w * ss - s * ws) / determinant
    if alpha < 0:
        return 0.0, ss / s
    return alpha, determinant / (ww * s - ws * w)


def _pairs(x: list[float], y: list[float]) -> tuple[tuple[list[float], list[float]], ...]:
    return (x, x), (x, y), (y, y)


def calibrate(jobs: Jobs, namespaces: Namespaces, rate: float, asked: str) -> Link:
    """Shape the link to `rate` bytes per second and measure it."""
    namespaces.shape(rate)
    sizes = SIZES[: max(3, sum(size <= rate * LONGEST_SECONDS for size in SIZES))]
    job = jobs.start("calibration", GatherTask(sizes, REPEATS), len(namespaces.names), namespaces)
    answers = jobs.ask(job)
    jobs.close(job)
    by_size = zip(*(answer["seconds"] for answer in answers), strict=True)
    slowest = [median(max(ranks) for ranks in zip(*repeats, strict=True)) for repeats in by_size]
    samples = tuple(zip(sizes, slowest, strict=True))
    return Link("tbf", asked, rate, samples, *fit(samples))


def calibrate_to(jobs: Jobs, namespaces: Namespaces, beta: float, asked: str) -> Link:
    """Find the shaped rate at which all-gathers reach `beta` bytes per second, as close as a few attempts get."""
    links: list[Link] = []
    rate = beta / FIRST_GUESS
    for _ in range(ATTEMPTS):
        links.append(calibrate(jobs, namespaces, rate, asked))
        reached = links[-1].beta_bytes_per_second
        if abs(reached / beta - 1) <= CLOSE:
            break
        rate *= beta / reached
    best = min(links, key=lambda link: abs(link.beta_bytes_per_second / beta - 1))
    namespaces.shape(best.rate_bytes)
    return best
