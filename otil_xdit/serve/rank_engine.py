"""`RankEngine`: the ranks as an engine: starts them, talks with rank 0, and starts them again when one is lost."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from otil_xdit.serve import wire
from otil_xdit.serve.engine import Cancelled, EngineFailure, EngineStatus, Refused
from otil_xdit.serve.planning import RanksLaunch
from otil_xdit.serve.rank_processes import RankProcesses
from otil_xdit.serve.requests import DrawnImage, ImageRequest, ModelFacts, StepDone, pixels_from_wire
from otil_xdit.serve.restarts import Restarts
from otil_xdit.serve.settings import ServeSettings

logger = logging.getLogger(__name__)

CANCEL_SECONDS = 60.0
"""How long ranks may take to end a cancelled image; they are started again otherwise."""

POLL_SECONDS = 0.2
GOODBYE_SECONDS = 10.0


class RankEngine:
    """The ranks of `xfuser serve`; see `otil_xdit.serve.engine.Engine`.

    Over 200 lines: the ranks' life, their messages and the image under way are one state.

    Args:
        launch: how to start them.
        settings: the server's.
    """

    def __init__(self, launch: RanksLaunch, settings: ServeSettings) -> None:
        self._launch, self._settings = launch, settings
        self._status = EngineStatus("loading")
        self._facts: ModelFacts | None = None
        self._changed = asyncio.Condition()
        self._processes: RankProcesses | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._is_up = asyncio.Event()
        self._loss: asyncio.Future[str] | None = None
        self._drawing: _Drawing | None = None
        self._last_beat = 0.0
        self._places: dict[int, str] = {}
        self._folder = ""
        self._server: asyncio.Server | None = None
        self._life: asyncio.Task[None] | None = None
        self._restarts = Restarts(settings.max_restarts)

    @property
    def status(self) -> EngineStatus:
        return self._status

    @property
    def facts(self) -> ModelFacts | None:
        return self._facts

    async def start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="otil-xdit-serve-")  # which only this user may enter
        self._server = await asyncio.start_unix_server(self._talk, os.path.join(self._folder, "ranks"))
        self._life = asyncio.create_task(self._live())

    async def wait_until_ready(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._status.state in ("ready", "failed", "stopped"))
        if self._status.state != "ready":
            raise EngineFailure(self._status.reason or "the server has been stopped")

    async def draw(self, requests: Sequence[ImageRequest], on_step: Callable[[StepDone], None]) -> list[DrawnImage]:
        assert self._drawing is None, "one image at a time"
        if self._status.state != "ready" or self._writer is None:
            raise EngineFailure(self._status.reason or f"the ranks are {self._status.state}")
        wired = [request.to_wire() for request in requests]
        drawing = self._drawing = _Drawing(uuid.uuid4().hex, on_step)
        try:
            message = {"type": "generate", "id": drawing.number, "requests": [values for values, _ in wired]}
            self._send(message, [blob for _, blobs in wired for blob in blobs])
            return await drawing.done
        finally:
            self._drawing = None

    def cancel(self) -> None:
        drawing = self._drawing
        if drawing is not None and not drawing.is_cancelled:
            drawing.is_cancelled = True
            self._send({"type": "cancel", "id": drawing.number})
            asyncio.get_running_loop().call_later(CANCEL_SECONDS, self._check_cancelled, drawing)

    async def stop(self) -> None:
        await self._set(EngineStatus("stopped", "the server is shutting down", self._status.restarts))
        self._send({"type": "shutdown"})
        if self._processes is not None:
            await self._processes.wait(GOODBYE_SECONDS)
        if self._life is not None:
            self._life.cancel()
            with suppress(asyncio.CancelledError):
                await self._life
        if self._processes is not None:
            await self._processes.stop()
        self._fail_drawing(self._status.reason)
        if self._server is not None:
            self._server.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---- an image --------------------------------------------------------------------------------------------------

    def _fail_drawing(self, reason: str) -> None:
        """Let the image under way be lost."""
        if self._drawing is not None and not self._drawing.done.done():
            self._drawing.done.set_exception(EngineFailure(reason))

    def _check_cancelled(self, drawing: _Drawing) -> None:
        if not drawing.done.done():
            self._lose(f"the ranks did not end a cancelled image within {CANCEL_SECONDS:g} s")

    # ---- what rank 0 says ------------------------------------------------------------------------------------------

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                values, blobs = await wire.read(reader)
                self._hear(values, blobs)
        writer.close()

    def _hear(self, values: dict[str, Any], blobs: list[bytes]) -> None:
        self._last_beat = time.monotonic()
        kind = values["type"]
        if kind == "beat":
            self._hear_beat(values)
        elif kind == "ready":
            self._facts = ModelFacts.from_wire(values["facts"])
            self._is_up.set()
        elif self._drawing is not None and values.get("id") == self._drawing.number:
            self._drawing.hear(values, blobs)
            if kind == "failed" and values["is_lost"]:
                self._lose(values["message"])
            elif kind == "done":
                self._restarts.count_anew()

    def _hear_beat(self, values: dict[str, Any]) -> None:
        self._places = {0: values["where"]}
        for rank, (seconds, where) in values["others"].items():
            self._places[int(rank)] = where
            if seconds > self._settings.silence_timeout:
                self._lose(_silent(int(rank), seconds, where))

    def _send(self, values: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.encode(values, blobs))

    # ---- the ranks' life -------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        """Start the ranks, and again whenever they are lost, until that has been too often."""
        while True:
            reason = await self._live_once()
            if self._status.state == "stopped":
                self._fail_drawing(self._status.reason)
                return
            self._fail_drawing(reason)
            pause = self._restarts.next_pause()
            if pause is None or self._facts is None:
                await self._set(EngineStatus("failed", reason, self._status.restarts))
                logger.error("the ranks are not started again", extra={"reason": reason})
                return
            await self._set(EngineStatus("restarting", reason, self._status.restarts + 1))
            logger.error("the ranks were lost", extra={"reason": reason, "pause": pause})
            await asyncio.sleep(pause)

    async def _live_once(self) -> str:
        """Run the ranks until they are lost; return why."""
        self._is_up.clear()
        self._places.clear()
        self._loss = asyncio.get_running_loop().create_future()
        environment = {wire.SOCKET_VARIABLE: os.path.join(self._folder, "ranks")}
        processes = self._processes = RankProcesses(self._launch, environment)
        try:
            watch = asyncio.create_task(self._watch(processes))
            reason = await self._loss
            watch.cancel()
            said = await processes.last_words() if reason.startswith(_ENDED) else ""
            return f"{reason}{said and ': ' + said}{self._whereabouts() if said else ''}"
        finally:
            self._writer = None
            await asyncio.shield(processes.stop())

    async def _watch(self, processes: RankProcesses) -> None:
        begun, is_up = time.monotonic(), False
        while True:
            await asyncio.sleep(POLL_SECONDS)
            code, now = processes.poll(), time.monotonic()
            if code is not None:
                self._lose(f"{_ENDED} with exit code {code}")
            elif not is_up and self._is_up.is_set():
                is_up, self._last_beat = True, now
                await self._set(EngineStatus("ready", "", self._status.restarts))
                logger.info(
                    "ready", extra={"seconds": round(now - begun, 2), "ranks": self._facts and self._facts.ranks}
                )
            elif not is_up and now - begun > self._settings.load_timeout:
                self._lose(f"the ranks did not load the model within {self._settings.load_timeout:g} s")
            elif is_up and now - self._last_beat > self._settings.silence_timeout:
                self._lose(_silent(0, now - self._last_beat, self._places.get(0, "")))

    def _lose(self, reason: str) -> None:
        if self._loss is not None and not self._loss.done():
            self._loss.set_result(reason)

    def _whereabouts(self) -> str:
        """Return where the ranks last were, by their signs of life."""
        places = [f"rank {rank} {where}" for rank, where in sorted(self._places.items()) if where]
        return f" (last seen: {'; '.join(places)})" if places else ""

    async def _set(self, status: EngineStatus) -> None:
        if self._status.state == "stopped":
            status = replace(status, state="stopped")
        async with self._changed:
            self._status = status
            self._changed.notify_all()


_ENDED = "the ranks ended"


def _silent(rank: int, seconds: float, where: str) -> str:
    place = f", last seen at {where}" if where else ""
    return f"rank {rank} has said nothing for {seconds:.0f} s{place}: it hangs or is stopped"


class _Drawing:
    """The images under way, of one call of `RankEngine.draw`."""

    def __init__(self, number: str, on_step: Callable[[StepDone], None]) -> None:
        self.number, self._on_step = number, on_step
        self.is_cancelled = False
        self.done: asyncio.Future[list[DrawnImage]] = asyncio.get_running_loop().create_future()

    def hear(self, values: dict[str, Any], blobs: list[bytes]) -> None:
        """Take what rank 0 says of it."""
        if self.done.done():
            return
        kind = values["type"]
        pixels = pixels_from_wire(values, blobs)
        if kind == "step":
            self._on_step(StepDone(values["step"], values["steps"], pixels[0] if pixels else None))
        elif kind == "done":
            costs = (values[name] / len(pixels) for name in ("seconds", "sent_bytes", "waited_seconds"))
            seconds, sent, waited = costs
            self.done.set_result([DrawnImage(one, seconds, round(sent), waited) for one in pixels])
        elif kind == "refused":
            self.done.set_exception(Refused(values["message"]))
        elif kind == "cancelled":
            self.done.set_exception(Cancelled(values["message"]))
        elif kind == "failed" and not values["is_lost"]:
            self.done.set_exception(EngineFailure(values["message"]))
