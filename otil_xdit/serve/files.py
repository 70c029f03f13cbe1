"""`Files`: images that clients fetch by address, kept in memory for a while."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict

KEPT_SECONDS = 3600.0
KEPT_BYTES = 256 << 20
"""How long an image is kept, and how many bytes of all; the oldest ones go first."""


class Files:
    """The images of ``response_format=url``; their names cannot be guessed, and are no paths."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, tuple[bytes, str, float]] = OrderedDict()
        self._bytes = 0

    def add(self, data: bytes, kind: str) -> str:
        """Keep a file of that media type; return its name."""
        name = secrets.token_urlsafe(16)
        self._files[name] = (data, kind, time.monotonic())
        self._bytes += len(data)
        self._forget()
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Return a file and its media type; None for one that is not there, or no more."""
        self._forget()
        found = self._files.get(name)
        return None if found is None else found[:2]

    def _forget(self) -> None:
        oldest = time.monotonic() - KEPT_SECONDS
        while self._files and (self._bytes > KEPT_BYTES or next(iter(self._files.values()))[2] < oldest):
            self._bytes -= len(self._files.popitem(last=False)[1][0])
