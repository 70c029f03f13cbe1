"""A request to the server, step by step, with Python's own HTTP client."""

from __future__ import annotations

import base64
import http.client
import json
import os
import queue
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from typing import Any
from urllib.parse import urlsplit

POLL_SECONDS = 0.25
"""Between two looks whether the user has stopped the workflow."""

CONNECT_SECONDS = 20.0


def make_images(
    address: str,
    fields: Mapping[str, Any],
    files: Mapping[str, bytes],
    on_step: Callable[[int, int, bytes | None], None],
    check_stopped: Callable[[], None],
) -> list[bytes]:
    """Have images made, and return them as PNG files.

    Args:
        address: of the server, as ``http://127.0.0.1:8000``.
        fields: of OpenAI's images API and the server's further ones.
        files: PNG files by field; with them the route is that of edits.
        on_step: called with the step, the steps, and a preview's PNG file where there is one.
        check_stopped: called every now and then; what it raises ends the request, and the server ends the image.

    Raises:
        RuntimeError: with what the server says is wrong, or that it does not answer.
    """
    route = "v1/images/edits" if files else "v1/images/generations"
    fields = {**fields, "stream": True}
    kind, body = _form(fields, files) if files else ("application/json", json.dumps(fields).encode())
    made: list[bytes] = []
    try:
        with closing(_Stream(address, route, kind, body)) as stream:
            for event in stream.events(check_stopped):
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                picture = base64.b64decode(event["b64_json"]) if "b64_json" in event else None
                if event["type"].endswith(".completed") and picture is not None:
                    made.append(picture)
                else:
                    on_step(event["step"], event["steps"], picture)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RuntimeError(f"{address} does not answer as `xfuser serve` does: {error}") from error
    if not made:
        raise RuntimeError(f"{address} has closed the connection before the image was done")
    return made


class _Stream:
    """A request whose answer is read by a thread, so that the caller can look up in between."""

    def __init__(self, address: str, route: str, kind: str, body: bytes) -> None:
        parts = urlsplit(address if "//" in address else f"http://{address}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("give an address like http://127.0.0.1:8000")
        secure = parts.scheme == "https"
        connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(
            parts.hostname, parts.port, timeout=CONNECT_SECONDS
        )
        connection.connect()
        self._socket: socket.socket = connection.sock
        self._socket.settimeout(None)  # an image may wait in the queue for as long as the server allows
        headers = {"Content-Type": kind, "Connection": "close"}
        if os.environ.get("XFUSER_SERVE_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['XFUSER_SERVE_API_KEY']}"
        connection.request("POST", f"{parts.path.rstrip('/')}/{route}", body, headers)
        self._connection = connection
        self._events: queue.SimpleQueue[dict[str, Any] | Exception | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="xfuser serve", daemon=True).start()

    def events(self, check_stopped: Callable[[], None]) -> Iterator[dict[str, Any]]:
        """Yield the server's events; an answer other than 200 is one, too."""
        while True:
            check_stopped()
            with suppress(queue.Empty):
                event = self._events.get(timeout=POLL_SECONDS)
                if event is None:
                    return
                if isinstance(event, Exception):
                    raise event
                yield event

    def close(self) -> None:
        """Hang up, which cancels an image that is not done."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        try:
            answer = self._connection.getresponse()
            if answer.status != 200:
                self._events.put(_error_of(answer.status, answer.read()))
                return
            for line in answer:
                if line.startswith(b"data: {"):
                    self._events.put(json.loads(line[6:]))
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._events.put(error)
        finally:
            self._events.put(None)


def _error_of(status: int, body: bytes) -> dict[str, Any]:
    """Return the server's error; a proxy between may answer anything."""
    try:
        return {"error": {"message": str(json.loads(body)["error"]["message"])}}
    except (ValueError, KeyError, TypeError):
        return {"error": {"message": f"the server answers {status}"}}


def _form(fields: Mapping[str, Any], files: Mapping[str, bytes]) -> tuple[str, bytes]:
    """Return the media type and the body of a form."""
    mark = uuid.uuid4().hex
    parts = []
    for name, value in fields.items():
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode())
    for name, data in files.items():
        head = f'--{mark}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}.png"\r\n'
        parts.append(f"{head}Content-Type: image/png\r\n\r\n".encode() + data + b"\r\n")
    return f"multipart/form-data; boundary={mark}", b"".join([*parts, f"--{mark}--\r\n".encode()])
