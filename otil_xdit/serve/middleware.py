"""Round every request: its id, the log line, the key, the limit of its body. Plain ASGI, so nothing is buffered."""

from __future__ import annotations

import base64
import logging
import secrets
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from otil_xdit.serve.metrics import Metrics
from otil_xdit.serve.problems import Problem

logger = logging.getLogger(__name__)

OPEN = ("/health", "/liveness", "/v1/files/", "/page/")
"""Beginnings of paths that need no key: probes have none, names of files cannot be guessed, the page asks for it."""


class Envelope:
    """Gives a request its id (``x-request-id``), logs and counts its answer.

    A fault of the server is answered in OpenAI's error shape, and logged with its traceback.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope.setdefault("state", {})["request_id"] = uuid.uuid4().hex
        begun, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("a fault of the server", extra={"request": request_id})
            if status == 0:
                await Problem(500, "a fault of the server").response(request_id)(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, str(status)).inc()
            seconds = round(time.monotonic() - begun, 3)
            details = {"request": request_id, "status": status, "seconds": seconds}
            quiet = route in ("/health", "/liveness", "/metrics")
            logger.log(logging.DEBUG if quiet else logging.INFO, "%s %s", scope["method"], scope["path"], extra=details)


class KeyCheck:
    """Answers 401 without the key.

    Args:
        key: as ``Authorization: Bearer KEY``, or as the password of HTTP's basic authentication; None for no check.
        open_paths: beginnings of paths that need none; "/" alone is the page.
    """

    def __init__(self, app: ASGIApp, key: str | None, open_paths: tuple[str, ...] = OPEN) -> None:
        self._app, self._key, self._open = app, key, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._key is None or self._is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        if secrets.compare_digest(_key_in(Headers(scope=scope)).encode(), self._key.encode()):
            await self._app(scope, receive, send)
            return
        problem = Problem(401, "give the server's key as bearer token", code="invalid_api_key")
        await problem.response(scope["state"]["request_id"])(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path == "/" or path.startswith(self._open)


def _key_in(headers: Headers) -> str:
    """Return the key that a request brings; empty for none."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:  # neither base64 nor UTF-8
            return ""
    return value.strip() if kind.lower() == "bearer" else ""


class BodyLimit:
    """Answers 413 to a body of more bytes than `limit`, as soon as that is known."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        text = f"the body has more than {self._limit} bytes"
        told, taken = Headers(scope=scope).get("content-length", "0"), 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._limit:
                raise HTTPException(413, text)  # FastAPI lets this kind through while it reads a body
            return message

        if told.isdecimal() and int(told) > self._limit:
            problem = Problem(413, text, code="body_too_large")
            await problem.response(scope["state"]["request_id"])(scope, receive, send)
            return
        await self._app(scope, limited, send)


def request_id(request: Any) -> str:
    """Return the id of a request."""
    return str(request.scope["state"]["request_id"])
