"""Messages between the server and rank 0: a JSON object and some byte strings, over a local socket.

A message is ``>I`` bytes of JSON, whose ``blobs`` are the lengths of the byte strings that follow it. Nothing of it is
pickled, and the socket lies in a folder that only its user may enter.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

SOCKET_VARIABLE = "OTIL_XDIT_SERVE_SOCKET"
"""Environment variable in which rank 0 finds the socket's path."""

_LENGTH = struct.Struct(">I")

Message = tuple[dict[str, Any], list[bytes]]


def encode(values: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """Return a message as bytes."""
    head = json.dumps({**values, "blobs": [len(blob) for blob in blobs]}).encode()
    return b"".join([_LENGTH.pack(len(head)), head, *blobs])


def decode(data: bytes) -> Message:
    """Return the message that `encode` wrote."""
    start = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    values, blobs = json.loads(data[_LENGTH.size : start]), []
    for length in values.pop("blobs"):
        blobs.append(data[start : start + length])
        start += length
    return values, blobs


async def read(reader: asyncio.StreamReader) -> Message:
    """Return the next message.

    Raises:
        asyncio.IncompleteReadError: when the other side is gone.
    """
    length = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))[0]
    values = json.loads(await reader.readexactly(length))
    return values, [await reader.readexactly(size) for size in values.pop("blobs")]


class BlockingWire:
    """Rank 0's end of the socket, for several threads.

    Args:
        path: of the server's socket.

    Raises:
        OSError: when nobody listens there.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._file = self._socket.makefile("rb")
        self._lock = threading.Lock()

    def send(self, values: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Send a message.

        Raises:
            OSError: when the server is gone.
        """
        data = encode(values, blobs)
        with self._lock:
            self._socket.sendall(data)

    def receive(self) -> Message | None:
        """Wait for the next message; None when the server is gone. For one thread only."""
        head = self._file.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            return None
        values = json.loads(self._file.read(_LENGTH.unpack(head)[0]))
        blobs = [self._file.read(size) for size in values.pop("blobs")]
        return values, blobs
