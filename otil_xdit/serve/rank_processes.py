"""`RankProcesses`: torchrun and its ranks, started once and ended for certain."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping

from otil_xdit.serve.planning import RanksLaunch
from otil_xdit.xdit.launcher.processes import free_port, start, stop

KEPT_LINES = 20
"""Of what the ranks write to stderr, for the reason of a loss."""

LAST_WORDS_SECONDS = 2.0
_PORT = "--master_port="


class RankProcesses:
    """One start of the ranks. What they write goes to this process's stdout and stderr.

    Args:
        launch: how to start them; on one machine they find each other at another port each time.
        environment: variables besides those of `launch`.
    """

    def __init__(self, launch: RanksLaunch, environment: Mapping[str, str]) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        is_one_machine = "--nnodes=1" in launch.command
        command = [
            f"{_PORT}{free_port()}" if is_one_machine and part.startswith(_PORT) else part for part in launch.command
        ]
        self._process, self._mark = start(
            command, {**launch.environment, **environment}, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self._reader = threading.Thread(target=self._forward, name="ranks' stderr", daemon=True)
        self._reader.start()

    def poll(self) -> int | None:
        """Return the exit code; None while they run."""
        return self._process.poll()

    async def wait(self, seconds: float) -> None:
        """Wait for their end, no longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    async def last_words(self) -> str:
        """Return what they said of their failure: the launcher's line, and what ranks noticed of each other."""
        await asyncio.to_thread(self._reader.join, LAST_WORDS_SECONDS)
        lines = [line for line in self._lines if line.startswith(("xfuser: error: ", "rank "))]
        return "; ".join(dict.fromkeys(line.removeprefix("xfuser: error: ") for line in reversed(lines)))

    async def stop(self) -> None:
        """End everything that was started."""
        await asyncio.to_thread(stop, self._process, self._mark)

    def _forward(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode(errors="replace")
            self._lines.append(text.rstrip())
            sys.stderr.write(text)
            sys.stderr.flush()
