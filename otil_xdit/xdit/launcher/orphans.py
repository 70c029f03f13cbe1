"""No process outlives its parent: SIGKILL leaves a launcher, and torchrun, no time to end what they have started."""

from __future__ import annotations

import os
import signal
import threading
import time

PARENT = "OTIL_XDIT_PARENT"
"""Environment variable with the process id of who has started this process and wants it to end together with it."""

LOOK_SECONDS = 0.5
"""Seconds between two looks at the parent."""


def end_with_parent(last_seconds: float) -> None:
    """Have a thread end this process when its parent has died; nothing where no parent asks for that.

    Args:
        last_seconds: how long the process has to end by SIGTERM before it is killed.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is not None:
        arguments = int(parent), last_seconds
        threading.Thread(target=_watch, args=arguments, name="otil-xdit parent", daemon=True).start()


def _watch(parent: int, last_seconds: float) -> None:
    while os.getppid() == parent:  # whose parent dies is given another one
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(last_seconds)
    os.kill(os.getpid(), signal.SIGKILL)
