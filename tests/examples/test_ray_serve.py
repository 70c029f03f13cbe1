"""Two replicas of two CPU ranks in Ray Serve, one of which is killed in the middle of a load; minutes on two cores."""

from __future__ import annotations

import base64
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'ray[serve]'")

from tests.support.served import PATIENCE  # noqa: E402

pytestmark = pytest.mark.slow

PORT = 18473
FLAGS = "--model tiny-sd --parallel otil --patch_degree 2"
REQUESTS, CLIENTS, KINDS = 20, 6, 4


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from ray import serve

    from examples.ray_serve import build

    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    variables = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": variables}, log_to_driver=True)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT, "request_timeout_s": PATIENCE})
    serve.run(build({"flags": FLAGS, "cards": "0", "ranks": "2", "max_replicas": "2", "upscale_delay_s": "1"}))
    yield f"http://127.0.0.1:{PORT}"
    serve.shutdown()
    ray.shutdown()


def draw(address: str, kind: int) -> httpx.Response:
    body = {"prompt": "a large red circle", "seed": kind, "num_inference_steps": 4 + kind}
    return httpx.post(f"{address}/v1/images/generations", json=body, timeout=PATIENCE)


def replicas() -> list[psutil.Process]:
    """The processes of the replicas."""
    return [one for one in psutil.process_iter(["cmdline"]) if "ServeReplica:default:Images" in _title(one)]


def running() -> int:
    """How many replicas make images."""
    from ray import serve

    states = serve.status().applications["default"].deployments["Images"].replica_states
    return int(states.get("RUNNING", 0))


def _title(process: Any) -> str:
    return " ".join(process.info["cmdline"] or ())


def test_a_replica_is_killed_and_everybody_is_answered(address: str) -> None:
    wanted = [draw(address, kind).json()["data"][0]["b64_json"] for kind in range(KINDS)]
    assert len({base64.b64decode(one) for one in wanted}) == KINDS and len(replicas()) == 1
    answers: list[tuple[int, httpx.Response]] = []
    todo, lock = list(range(REQUESTS)), threading.Lock()
    go_on = threading.Event()

    def client() -> None:
        while True:
            with lock:
                if not todo:
                    if go_on.is_set():
                        return
                    todo.append(0)  # load enough for a second replica, until there is one
                kind = todo.pop() % KINDS
            answer = draw(address, kind)
            with lock:
                answers.append((kind, answer))

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    while running() < 2:
        assert time.monotonic() < deadline, "no second replica"
        time.sleep(0.2)
    with lock:
        before = len(answers)
        todo.extend(range(REQUESTS))
    while len(answers) < before + 4:
        time.sleep(0.05)
    victim = replicas()[0]
    ranks = [one for one in victim.children(recursive=True) if "otil_xdit.serve.ranks" in " ".join(one.cmdline())]
    assert len(ranks) >= 2
    victim.kill()
    go_on.set()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert len(answers) >= before + REQUESTS
    statuses = Counter(answer.status_code for _, answer in answers)
    assert set(statuses) == {200}, statuses
    assert all(answer.json()["data"][0]["b64_json"] == wanted[kind] for kind, answer in answers)
    psutil.wait_procs(ranks, timeout=60)
    assert not [one for one in ranks if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    print(f"{len(answers)} requests answered, {before} of them before the second replica was there")


def test_streams_and_errors_come_through(address: str) -> None:
    body = {"prompt": "a", "num_inference_steps": 4, "stream": True}
    with httpx.stream("POST", f"{address}/v1/images/generations", json=body, timeout=PATIENCE) as answer:
        events = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event: ")]
    assert events[-1] == "image_generation.completed" and "image_generation.progress" in events
    wrong = httpx.post(f"{address}/v1/images/generations", json={"prompt": "a", "seedd": 1}, timeout=PATIENCE)
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "seedd"
    page = httpx.get(f"{address}/", timeout=PATIENCE)
    assert "script.js" in page.text and page.headers["content-security-policy"]


def test_a_client_that_hangs_up_cancels_its_image(address: str) -> None:
    body = {"prompt": "a", "num_inference_steps": 150, "size": "256x256"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/images/generations", json=body, timeout=2.0)
    begun = time.monotonic()
    while "xfuser_serve_running 1.0" in httpx.get(f"{address}/metrics", timeout=PATIENCE).text:
        assert time.monotonic() - begun < 40
        time.sleep(0.2)
