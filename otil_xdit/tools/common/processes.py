"""What the tools that start ranks share: their environment, signals, progress, and how a rank begins and fails."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from tqdm import tqdm

from otil_xdit.xdit.cpu import has_accelerator
from otil_xdit.xdit.launcher.processes import CPU_ENVIRONMENT

LOG_SECONDS = 30.0
"""How often progress is written where stderr is no terminal but a file."""

SIGNALLED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes after a signal to this process."""


class Interrupted(Exception):
    """SIGINT or SIGTERM came while ranks ran; all of them are stopped. Carries the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def rank_environment() -> dict[str, str]:
    """Return the environment of ranks: this process's, with defaults where ranks share CPU cores."""
    return {**({} if has_accelerator() else CPU_ENVIRONMENT), **os.environ}


def progress(total: int, unit: str, about: str = "") -> tqdm:
    """Return a bar on stderr, which writes seldom where that is no terminal."""
    interval = 1.0 if sys.stderr.isatty() else LOG_SECONDS
    return tqdm(total=total, desc=about, unit=unit, file=sys.stderr, mininterval=interval)


def take_device() -> None:
    """In a rank: take its GPU, or one thread where there is none."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)


def last_line(error: Exception) -> str:
    """Return an error's kind and the last line of what it says; where it says nothing, where it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {lines[-1] if lines else f'{Path(place.filename).name}: {place.line}'}"
