"""Stands in for torchrun and its ranks, without torch: does what the prompt says.

"die": end with exit code 7 and a line on stderr, as the launcher writes it; "hang": say nothing more; "other": tell
that rank 1 has fallen silent; "slow": so many steps that only a cancel ends it; "deaf": the same, and take no cancel;
"refuse", "fail", "lose": answer so; anything else: an image.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

from otil_xdit.serve.requests import ModelFacts, Pixels, pixels_to_wire
from otil_xdit.serve.wire import SOCKET_VARIABLE, BlockingWire

BEAT = 0.05


class FakeRanks:
    """Rank 0 as the server sees it."""

    def __init__(self) -> None:
        self.wire = BlockingWire(os.environ[SOCKET_VARIABLE])
        self.is_silent, self.cancelled = False, ""
        self.others: dict[str, tuple[float, str]] = {}

    def beat(self) -> None:
        while not self.is_silent:
            self.wire.send({"type": "beat", "where": "layer a at step 1", "others": self.others})
            time.sleep(BEAT)

    def draw(self, number: str, prompt: str) -> None:
        if prompt == "die":
            print("xfuser: error: rank 1 was ended by SIGKILL", file=sys.stderr, flush=True)
            os._exit(7)
        if prompt == "hang":
            self.is_silent = True
            return
        if prompt == "other":
            self.others = {"1": (99.0, "layer b at step 2")}
            return
        answers: dict[str, dict[str, Any]] = {
            "refuse": {"type": "refused", "message": "no such size"},
            "fail": {"type": "failed", "message": "OutOfMemoryError", "is_lost": False},
            "lose": {"type": "failed", "message": "rank 0: rank 1 says nothing", "is_lost": True},
        }
        if prompt in answers:
            self.wire.send({**answers[prompt], "id": number})
            return
        for step in range(1, 10_000 if prompt in ("slow", "deaf") else 3):
            self.wire.send({"type": "step", "id": number, "step": step, "steps": 2})
            if self.cancelled == number and prompt != "deaf":
                self.wire.send({"type": "cancelled", "id": number, "message": f"after step {step}"})
                return
            time.sleep(0.005)
        costs = {"seconds": 0.5, "sent_bytes": 10, "waited_seconds": 0.1}
        sizes, blobs = pixels_to_wire([Pixels(1, 1, "RGB", prompt.encode()[:3].ljust(3))])
        self.wire.send({"type": "done", "id": number, **costs, **sizes}, blobs)

    def serve(self) -> None:
        self.wire.send({"type": "ready", "facts": asdict(ModelFacts("fake", ranks=2))})
        threading.Thread(target=self.beat, daemon=True).start()
        while (message := self.wire.receive()) is not None and message[0]["type"] != "shutdown":
            values = message[0]
            if values["type"] == "cancel":
                self.cancelled = values["id"]
            else:
                arguments = (values["id"], values["requests"][0]["prompt"])
                threading.Thread(target=self.draw, args=arguments, daemon=True).start()


if __name__ == "__main__":
    if "--broken" in sys.argv:
        sys.exit("xfuser: error: --model fake: no such file")
    FakeRanks().serve()
