"""One image on two machines: two network namespaces with a cable between them, a rank in each; needs root."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from otil_xdit.tools.bench.link import LinkError, Namespaces, address, check_possible
from tests.support.served import PATIENCE, served

pytestmark = pytest.mark.slow

MODEL = ["--model", "tiny-sd", "--parallel", "otil", "--patch_degree", "2", "--silence_timeout", "10"]
IMAGE = {"prompt": "a large red circle", "seed": 3, "num_inference_steps": 5}

ASK = """
import json, sys, urllib.error, urllib.request
body = sys.argv[2].encode() if len(sys.argv) > 2 else None
request = urllib.request.Request("http://127.0.0.1:8000" + sys.argv[1], body, {"Content-Type": "application/json"})
try:
    answer = urllib.request.urlopen(request, timeout=200)
except urllib.error.HTTPError as error:
    answer = error
print(answer.status, answer.read().decode())
"""
"""A client: the server's address is reached from within its namespace only."""


class Machines:
    """Both machines, and what runs on them."""

    def __init__(self, spaces: Namespaces, folder: Path, stack: ExitStack) -> None:
        self._spaces = spaces
        self.logs = [folder / f"machine{number}" for number in range(2)]
        self.processes = [self._start(number, stack) for number in range(2)]

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Status and body of an answer of machine 0; 0 where nobody answers."""
        command = [
            *self._spaces.inside(0),
            sys.executable,
            "-I",
            "-c",
            ASK,
            path,
            *([json.dumps(body)] if body else []),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        status, _, text = done.stdout.partition(" ")
        return (int(status), json.loads(text)) if done.returncode == 0 else (0, {})

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            ends = "".join(log.read_text()[-3000:] for log in self.logs)
            assert time.monotonic() < deadline and self.processes[0].poll() is None, f"not {what}: {ends}"
            time.sleep(0.3)

    def image(self) -> str:
        status, values = self.ask("/v1/images/generations", IMAGE)
        assert status == 200, values
        return str(values["data"][0]["b64_json"])

    def rank(self, number: int) -> psutil.Process:
        """The process of a machine's rank."""
        family = psutil.Process(self.processes[number].pid).children(recursive=True)
        return next(one for one in family if "otil_xdit.serve.ranks" in one.cmdline() and "RANK" in one.environ())

    def _start(self, number: int, stack: ExitStack) -> subprocess.Popen[bytes]:
        meeting = ["--nnodes", "2", "--node_rank", str(number), "--master_addr", address(0), "--master_port", "29571"]
        command = [*self._spaces.inside(number), sys.executable, "-m", "otil_xdit.serve", *MODEL, *meeting]
        environment = {**os.environ, **self._spaces.environment}
        log = stack.enter_context(self.logs[number].open("wb"))
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        stack.callback(_end, process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    try:
        check_possible("two machines")
        spaces = Namespaces(2).__enter__()
    except (ValueError, LinkError) as error:
        pytest.skip(str(error))
    with ExitStack() as stack:
        stack.callback(spaces.remove)
        yield Machines(spaces, tmp_path, stack)


def test_an_image_on_two_machines(machines: Machines) -> None:
    machines.until(lambda: machines.ask("/health")[0] == 200, "ready")
    assert machines.ask("/facts")[1]["ranks"] == 2
    made = machines.image()
    machines.rank(1).kill()
    machines.until(lambda: machines.ask("/health")[0] == 503, "noticed")
    assert "rank 1" in machines.ask("/health")[1]["reason"]
    machines.until(lambda: machines.ask("/health")[0] == 200, "ready again")
    assert machines.image() == made
    machines.processes[0].terminate()
    codes = [process.wait(60) for process in machines.processes]
    assert codes[0] in (0, -15, 143) and codes[1] == 0
    with served(*MODEL) as server:
        assert server.image(**IMAGE) == made
