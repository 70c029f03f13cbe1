"""What a server does when its ranks die, hang or are stopped, and when clients misbehave; minutes on two cores."""

from __future__ import annotations

import io
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from tests.support.served import PATIENCE, Served, served

pytestmark = pytest.mark.slow

MODEL = ["--model", "tiny-sdxl", "--parallel", "otil", "--patch_degree", "2"]
SMALL = {"seed": 3, "num_inference_steps": 4}
LONG = {"seed": 1, "num_inference_steps": 150, "size": "256x256"}
SILENCE = 8.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("lora")
    with served(*MODEL, "--silence_timeout", str(SILENCE), "--lora_dir", str(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def right(server: Served) -> str:
    """The image of `SMALL`."""
    return server.image(**SMALL)


class Call(threading.Thread):
    """A request in a thread of its own."""

    def __init__(self, server: Served, **fields: Any) -> None:
        super().__init__(daemon=True)
        self._server, self._fields = server, fields
        self.answer: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.answer = self._server.draw(**self._fields)

    def result(self) -> httpx.Response:
        self.join(PATIENCE)
        assert self.answer is not None, f"no answer: {self._server.end_of_log()}"
        return self.answer


def lose(server: Served, rank: int, number: signal.Signals) -> tuple[httpx.Response, httpx.Response, dict[str, Any]]:
    """Send a rank a signal in the middle of an image.

    Returns:
        The answers to that image and to the one behind it, and what ``/health`` said in between.
    """
    lost = Call(server, **LONG)
    server.until(lambda: "xfuser_serve_running 1.0" in server.http.get("/metrics").text, "begun")
    time.sleep(1.0)
    waiting = Call(server, **SMALL)
    server.until(lambda: "xfuser_serve_queue_length 1.0" in server.http.get("/metrics").text, "waiting")
    server.ranks()[rank].send_signal(number)
    server.until(lambda: server.health()[0] == 503, "noticed")
    health = server.health()[1]
    return lost.result(), waiting.result(), health


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank(server: Served, right: str, rank: int, number: signal.Signals) -> None:
    lost, waiting, health = lose(server, rank, number)
    error = lost.json()["error"]
    assert lost.status_code == 500 and lost.headers["x-request-id"] in error["message"]
    assert f"rank {rank}" in error["message"] and f"rank {rank}" in health["reason"] and "step" in health["reason"]
    assert health["status"] == "restarting" and "Traceback" not in lost.text
    assert waiting.status_code == 200 and waiting.json()["data"][0]["b64_json"] == right
    assert server.health()[0] == 200 and server.image(**SMALL) == right


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_while_nobody_asks(server: Served, right: str, number: signal.Signals) -> None:
    server.ranks()[1].send_signal(number)
    server.until(lambda: server.health()[0] == 503, "noticed", 3 * SILENCE)
    assert "rank 1" in server.health()[1]["reason"]
    refused = server.draw(**SMALL)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    server.until(server.is_ready, "ready")
    assert server.image(**SMALL) == right


def test_a_client_that_hangs_up(server: Served, right: str) -> None:
    begun = time.monotonic()
    for stream in (False, True):
        with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.url, timeout=1.0) as client:
            body = {"prompt": "a", **LONG, "stream": stream}
            with client.stream("POST", "/v1/images/generations", json=body) as answer:
                for _ in answer.iter_lines():
                    if time.monotonic() - begun > 3:
                        raise httpx.ReadTimeout("as told")
    assert server.image(**SMALL) == right
    assert server.log.read_text().count('"stage": "cancelled"') >= 2


def bomb() -> bytes:
    """A PNG of 400 million pixels in half a megabyte."""
    file = io.BytesIO()
    Image.new("L", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


NASTY: dict[str, tuple[int, Callable[[httpx.Client], httpx.Response]]] = {
    "10 MB of a prompt": (400, lambda http: http.post("/v1/images/generations", json={"prompt": "a" * 10_000_000})),
    "100 MB": (413, lambda http: http.post("/v1/images/generations", content=b"x" * 100_000_000)),
    "malformed JSON": (400, lambda http: http.post("/v1/images/generations", content=b'{"prompt": ')),
    "path in a LoRA's name": (
        400,
        lambda http: http.post("/v1/images/generations", json={"prompt": "a", "lora": "../../../etc/passwd"}),
    ),
    "decompression bomb": (
        413,
        lambda http: http.post("/v1/images/edits", data={"prompt": "a"}, files={"image": bomb()}),
    ),
    "10 MB that is no image": (
        400,
        lambda http: http.post("/v1/images/edits", data={"prompt": "a"}, files={"image": b"\x89PNG" * 2_500_000}),
    ),
    "size that cannot be cut": (
        422,
        lambda http: http.post("/v1/images/generations", json={"prompt": "a", "size": "128x16"}),
    ),
}


def test_nasty_requests_are_answered_at_once_and_break_nothing(server: Served, right: str) -> None:
    for what, (status, send) in NASTY.items():
        begun = time.monotonic()
        answer = send(server.http)
        assert answer.status_code == status, f"{what}: {answer.status_code} {answer.text[:300]}"
        assert "Traceback" not in answer.text and set(answer.json()) == {"error", "detail"}
        assert time.monotonic() - begun < 20, what
    assert server.image(**SMALL) == right and server.health()[1]["restarts"] <= 6


def test_given_up_health_stays_503() -> None:
    with served(*MODEL, "--max_restarts", "0") as server:
        server.image(**SMALL)
        server.ranks()[1].kill()
        server.until(lambda: server.health()[1]["status"] == "failed", "given up")
        for _ in range(3):
            status, health = server.health()
            assert status == 503 and "rank 1" in health["reason"]
            assert server.draw(**SMALL).status_code == 503
        assert server.http.get("/liveness").status_code == 200


def test_the_end_under_load_answers_everybody_and_leaves_nothing() -> None:
    with served(*MODEL, "--shutdown_timeout", "15") as server:
        ranks = server.ranks()
        calls = [Call(server, seed=3, num_inference_steps=15)]
        server.until(lambda: "xfuser_serve_running 1.0" in server.http.get("/metrics").text, "begun")
        calls += [Call(server, **LONG) for _ in range(3)]
        server.until(lambda: "xfuser_serve_queue_length 3.0" in server.http.get("/metrics").text, "waiting")
        begun = time.monotonic()
        server.terminate()
        assert time.monotonic() - begun < 60
        statuses = sorted(call.result().status_code for call in calls)
        assert statuses == [200, 503, 503, 503]
        assert not [rank for rank in ranks.values() if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]


def test_a_killed_server_takes_its_ranks_along() -> None:
    with served(*MODEL) as server:
        ranks = server.ranks()
        server.process.kill()
        psutil.wait_procs(list(ranks.values()), timeout=60)
        assert not [rank for rank in ranks.values() if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(AssertionError, match="xfuser: error: "), served("--model", str(folder)) as server:
        server.until(lambda: False, "ended")
