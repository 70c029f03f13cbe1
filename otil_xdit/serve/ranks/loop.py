"""The life of a rank: load, warm up, make one image after the other, end."""

from __future__ import annotations

import gc
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch

from otil_xdit.comm.store import default_store
from otil_xdit.errors import ExchangeTimeout
from otil_xdit.serve.engine import Cancelled
from otil_xdit.serve.ranks.drawing import Painter, pixels_of
from otil_xdit.serve.ranks.previews import Previews
from otil_xdit.serve.ranks.relay import Heartbeat, Relay
from otil_xdit.serve.ranks.steps import StepControl
from otil_xdit.serve.requests import ImageRequest, Pixels, pixels_from_wire, pixels_to_wire
from otil_xdit.serve.wire import SOCKET_VARIABLE, BlockingWire, Message, decode, encode
from otil_xdit.xdit.launcher.agent import one_line
from otil_xdit.xdit.launcher.quiet import what_runs
from otil_xdit.xdit.plugin.sessions import session_of
from otil_xdit.xdit.summary import report

BEAT_SECONDS = 1.0
"""Between two signs of life."""

WARMUP_STEPS = 4
"""Steps of the first image at most: enough for every kind of step to have been made once."""


def serve_ranks(runner_module: ModuleType) -> None:
    """Load the model that the command line names, and make images until the server says that it is over.

    Args:
        runner_module: xfuser's ``runner``, with the plugin hooked in.
    """
    parser = runner_module.FlexibleArgumentParser(allow_abbrev=False, description="xFuser Arguments")
    flags = vars(runner_module.xFuserArgs.add_runner_args(parser).parse_args())
    runner = runner_module.xFuserModelRunner(flags)
    values = runner.preprocess_args(flags)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    head = Head(BlockingWire(os.environ[SOCKET_VARIABLE])) if rank == 0 else None
    runner.initialize(values)
    worker = Worker(Painter(runner.model, values), head, rank, world_size)
    worker.warm_up(values)
    if head is not None:
        parallel = what_runs(runner.config, values).removeprefix(f"{runner.config.model}, ")
        head.wire.send({"type": "ready", "facts": asdict(worker.painter.facts(world_size, parallel))})
    while worker.work():
        pass
    runner.cleanup()


class Head:
    """Rank 0's talk with the server: a thread reads what it says, as a cancel comes while an image is made.

    Attributes:
        wire: to the server.
        work: what it has asked for.
    """

    def __init__(self, wire: BlockingWire) -> None:
        self.wire = wire
        self.work: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._cancelled = ""
        threading.Thread(target=self._read, name="otil-xdit serve", daemon=True).start()

    def is_cancelled(self, number: str) -> bool:
        """Return whether the server wants that image no more."""
        return bool(number) and number == self._cancelled

    def _read(self) -> None:
        message: Message | None = None
        with suppress(OSError):
            while (message := self.wire.receive()) is not None:
                if message[0]["type"] == "cancel":
                    self._cancelled = message[0]["id"]
                else:
                    self.work.put(message)
        self.work.put(({"type": "shutdown"}, []))  # the server is gone


class Worker:
    """One rank at work.

    Args:
        painter: of the loaded model.
        head: rank 0's; None elsewhere.
        rank, world_size: of all ranks.
    """

    def __init__(self, painter: Painter, head: Head | None, rank: int, world_size: int) -> None:
        self.painter, self._head = painter, head
        session = session_of(painter.pipe)
        self._detector = None if session is None else session.group.detector
        self._timeout = 300.0 if self._detector is None else self._detector.timeout
        self._is_alone = world_size == 1
        self._relay = None if self._is_alone else Relay(default_store(), rank, world_size)
        self._holder, self._rank = rank, rank
        self._start_beating(rank, world_size)

    def warm_up(self, values: dict[str, Any]) -> None:
        """Make a first image, and find out which rank has it: all with a U-Net, the last one with most of xDiT's.

        Raises:
            ValueError: for what no image of the server's own settings would be made with.
        """
        own = values.get("num_inference_steps") or WARMUP_STEPS
        request = ImageRequest(prompt=_first(values["prompt"]), seed=0, steps=min(own, WARMUP_STEPS))
        try:
            images = self._draw("", [request], lambda step, steps: None, None)
        except ValueError:  # on all ranks alike; hybridiff's window may be longer than so few steps
            if own <= WARMUP_STEPS:
                raise
            images = self._draw("", [replace(request, steps=own)], lambda step, steps: None, None)
        if self._relay is not None:
            held = self._relay.exchange("holds", str(int(bool(images))), self._timeout)
            self._holder = 0 if held[0] == "1" else held.index("1")

    def work(self) -> bool:
        """Do the next thing that is asked for; return whether to go on."""
        if self._head is not None:
            message = self._head.work.get()
            if message[0]["type"] == "generate" and not self._is_possible(*message):
                return True
            if self._relay is not None:
                self._relay.publish(encode(*message))
        else:
            assert self._relay is not None, "only rank 0 is alone"
            message = decode(self._relay.receive())
        values, blobs = message
        if values["type"] == "shutdown":
            return False
        self._generate(values["id"], [ImageRequest.from_wire(one, blobs) for one in values["requests"]])
        return True

    def _is_possible(self, values: dict[str, Any], blobs: list[bytes]) -> bool:
        """Return whether the model can make the image; otherwise the server is told why not."""
        assert self._head is not None
        blobs = list(blobs)
        try:
            for one in values["requests"]:
                self.painter.check(ImageRequest.from_wire(one, blobs))
        except (ValueError, AssertionError) as error:
            self._tell({"type": "refused", "id": values["id"], "message": str(error)})
            return False
        return True

    def _generate(self, number: str, requests: list[ImageRequest]) -> None:
        """Make images in one call, and tell the server of them."""
        shown: list[Pixels] = []

        def on_step(step: int, steps: int) -> None:
            preview, shown[:] = shown[-1:], []
            self._tell({"type": "step", "id": number, "step": step, "steps": steps}, preview)

        count = requests[0].previews if len(requests) == 1 else 0
        size = self.painter.size_of(requests[0])
        previews = Previews(count, size, shown.append) if count and self._head else None
        begun = time.monotonic()
        try:
            images = self._draw(number, requests, on_step, previews)
        except Cancelled as error:
            answer: dict[str, Any] = {"type": "cancelled", "message": str(error)}
        except (ValueError, AssertionError) as error:
            answer = {"type": "refused", "message": one_line(error)}
        except Exception as error:
            self._tell({"type": "failed", "id": number, "message": one_line(error), "is_lost": self._is_lost(error)})
            if self._is_lost(error):
                raise
            _free(error)
            return
        else:
            pixels = self._hand_over(images)
            made = report(self.painter.pipe)
            answer = {
                "type": "done",
                "seconds": time.monotonic() - begun,
                "sent_bytes": 0 if made is None else sum(sum(one.values()) for one in made.sent_bytes.values()),
                "waited_seconds": 0.0 if made is None else made.waited_seconds,
            }
            self._tell({**answer, "id": number}, pixels)
            return
        if self._is_lost(None):
            self._tell({"type": "failed", "id": number, "message": answer["message"], "is_lost": True})
            raise ExchangeTimeout(answer["message"])
        self._tell({**answer, "id": number})

    def _draw(
        self,
        number: str,
        requests: list[ImageRequest],
        on_step: Callable[[int, int], None],
        previews: Previews | None,
    ) -> list[Any]:
        is_cancelled = bool if self._head is None else partial(self._head.is_cancelled, number)
        control = StepControl(self._relay, self._rank == 0, is_cancelled, on_step, self._timeout)
        return self.painter.draw(requests, control, previews)

    def _hand_over(self, images: list[Any]) -> list[Pixels]:
        """Return the images on rank 0, to which another rank brings them where that has them."""
        if self._holder == self._rank == 0:
            return list(map(pixels_of, images))
        if self._relay is not None and self._rank == self._holder:
            self._relay.hand_over(encode(*pixels_to_wire(list(map(pixels_of, images)))))
        if self._relay is None or self._rank != 0:
            return []
        return pixels_from_wire(*decode(self._relay.take_over(self._timeout)))

    def _is_lost(self, error: BaseException | None) -> bool:
        """Return whether the ranks can make no more images after this."""
        if self._is_alone:
            return False
        if self._detector is None:  # nothing tells whether the others have left, too
            return error is not None
        return bool(self._detector.why_broken) or isinstance(error, ExchangeTimeout)

    def _tell(self, values: dict[str, Any], images: Sequence[Pixels] = ()) -> None:
        """Send the server a message; nothing on other ranks, or where the server is gone."""
        if self._head is not None:
            sizes, blobs = pixels_to_wire(images)
            with suppress(OSError):
                self._head.wire.send({**values, **sizes}, blobs)

    # ---- signs of life ---------------------------------------------------------------------------------------------

    def _start_beating(self, rank: int, world_size: int) -> None:
        heart = None if self._is_alone else Heartbeat(default_store(), rank, world_size)
        threading.Thread(target=self._beat, args=(heart,), name="otil-xdit heartbeat", daemon=True).start()

    def _beat(self, heart: Heartbeat | None) -> None:
        while True:
            where = "" if self._detector is None else self._detector.where
            others: dict[int, tuple[float, str]] = {}
            with suppress(RuntimeError):  # of a store that is gone; the ranks will be ended
                if heart is not None and self._head is None:
                    heart.beat(where)
                elif heart is not None:
                    others = heart.others()
            self._tell({"type": "beat", "where": where, "others": {str(rank): one for rank, one in others.items()}})
            time.sleep(BEAT_SECONDS)


def _free(error: BaseException) -> None:
    """Give back what an image held that has failed, which may have been for want of memory."""
    error.__traceback__ = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first(prompt: Any) -> str:
    return str(prompt[0]) if isinstance(prompt, list) else str(prompt)
