"""What the shaped link really gives: all-gathers of several sizes, timed on the ranks, and a line through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

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
class ShapedLink:
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


def fit(samples: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Fit seconds = alpha + bytes / beta by least squares of the relative errors.

    Relative, because the samples span orders of magnitude, and small messages matter as much as large ones.

    Args:
        samples: bytes and seconds.

    Returns:
        Alpha in seconds, not negative, and beta in bytes per second.
    """
    # Each sample is an equation alpha * (1 / seconds) + (1 / beta) * (bytes / seconds) = 1; these are its sums.
    w, s = sum(1 / seconds for _, seconds in samples), sum(size / seconds for size, seconds in samples)
    ww = sum(1 / seconds**2 for _, seconds in samples)
    ws = sum(size / seconds**2 for size, seconds in samples)
    ss = sum((size / seconds) ** 2 for size, seconds in samples)
    determinant = ww * ss - ws * ws
    alpha = (w * ss - s * ws) / determinant
    if alpha < 0:
        return 0.0, ss / s
    return alpha, determinant / (ww * s - ws * w)


def calibrate(jobs: Jobs, namespaces: Namespaces, rate: float, asked: str) -> ShapedLink:
    """Shape the link to a rate and measure it.

    Args:
        jobs: whose ranks the namespaces join.
        namespaces: that have the link.
        rate: bytes per second.
        asked: what the user asked for.
    """
    namespaces.shape(rate)
    sizes = SIZES[: max(3, sum(size <= rate * LONGEST_SECONDS for size in SIZES))]
    job = jobs.start("calibration", GatherTask(sizes, REPEATS), len(namespaces.names))
    answers = jobs.ask(job)
    jobs.close(job)
    by_size = zip(*(answer["seconds"] for answer in answers), strict=True)
    slowest = [median(max(ranks) for ranks in zip(*repeats, strict=True)) for repeats in by_size]
    samples = tuple(zip(sizes, slowest, strict=True))
    return ShapedLink("tbf", asked, rate, samples, *fit(samples))


def calibrate_to(jobs: Jobs, namespaces: Namespaces, beta: float, asked: str) -> ShapedLink:
    """Shape the link so that all-gathers reach `beta` bytes per second, as close as a few attempts get."""
    links: list[ShapedLink] = []
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
