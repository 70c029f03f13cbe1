"""A server of `xfuser serve` as a child process, and its ranks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

PATIENCE = 240.0
"""Seconds for a start; it takes 15 on an idle machine and minutes on a crowded one."""


class Served:
    """A server that runs.

    Args:
        process: of the server.
        log: what it writes.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log
        self.url = ""

    @property
    def http(self) -> httpx.Client:
        """A client of its own for each caller."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE)

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of ``/health``."""
        answer = self.http.get("/health")
        return answer.status_code, answer.json()

    def draw(self, **fields: Any) -> httpx.Response:
        """The answer to a request of an image."""
        return self.http.post("/v1/images/generations", json={"prompt": "a large red circle", **fields})

    def image(self, **fields: Any) -> str:
        """A request's image, in base64."""
        answer = self.draw(**fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["data"][0]["b64_json"])

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks by number."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if "otil_xdit.serve.ranks" in process.cmdline() and "RANK" in process.environ():
                found[int(process.environ()["RANK"])] = process
        return found

    def until(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        """Wait until something holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not {what} within {seconds:g} s: {self.end_of_log()}"
            assert self.process.poll() is None, self.end_of_log()
            time.sleep(0.05)

    def is_ready(self) -> bool:
        """Whether images can be made."""
        try:
            return self.health()[0] == 200
        except httpx.TransportError:
            return False

    def end_of_log(self) -> str:
        """The last lines that server and ranks wrote."""
        return self.log.read_text()[-4000:]

    def terminate(self) -> int:
        """Send SIGTERM, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextmanager
def served(*flags: str, ready: bool = True, environment: dict[str, str] | None = None) -> Iterator[Served]:
    """Start a server on a free port; end it, and all that it has started, at the end.

    Args:
        ready: whether to wait until images can be made.
    """
    command: Sequence[str] = [sys.executable, "-m", "otil_xdit.serve", "--port", "0", *flags]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            variables = {**os.environ, **(environment or {})}
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=variables)
        server = Served(process, log)
        family: list[psutil.Process] = []
        try:
            server.until(lambda: '"listening"' in log.read_text(), "listening")
            found = re.search(r'"address": "(http://[\w.:]+)"', log.read_text())
            assert found, server.end_of_log()
            server.url = found[1]
            if ready:
                server.until(server.is_ready, "ready")
            yield server
        finally:
            if process.poll() is None:
                family = psutil.Process(process.pid).children(recursive=True)
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
            for one in family:
                if one.is_running():
                    one.kill()
