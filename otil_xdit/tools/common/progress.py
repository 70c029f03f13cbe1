"""Progress of what takes minutes."""

from __future__ import annotations

import sys

from tqdm import tqdm

LOG_SECONDS = 30.0
"""How often progress is written where stderr is no terminal but a file."""


def progress(total: int, unit: str, about: str = "") -> tqdm:
    """Return a bar on stderr, which writes seldom where that is no terminal."""
    interval = 1.0 if sys.stderr.isatty() else LOG_SECONDS
    return tqdm(total=total, desc=about, unit=unit, file=sys.stderr, mininterval=interval)
