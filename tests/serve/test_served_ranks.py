"""Servers of a few ranks: the images of `xfuser`, a cancel, an end that leaves nothing behind."""

from __future__ import annotations

import base64
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.support.served import PATIENCE, Served, served

PROMPT, SEED, STEPS = "a large red circle on the left, striped background", 11, 8

CASES = {
    "U-Net": "--model tiny-sdxl --parallel otil --patch_degree 2",
    "DiT": "--model tiny-dit --parallel otil --patch_degree 2",
    "CFG in stages": "--model tiny-sd --parallel hybridiff --nproc_per_node 2",
    "nothing exchanged": "--model tiny-sd --parallel naive --patch_degree 2",
    "CFG, without a strategy": "--model tiny-sd --use_cfg_parallel",
    "one rank": "--model tiny-sd",
}


@pytest.mark.parametrize(
    "case", [case if case == "U-Net" else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_openais_client_gets_what_xfuser_makes(case: str, tmp_path: Path) -> None:
    flags = CASES[case].split()
    arguments = ["--prompt", PROMPT, "--seed", str(SEED), "--num_inference_steps", str(STEPS)]
    command = [sys.executable, "-c", "import sys; from otil_xdit.xdit.launcher.command import main; sys.exit(main())"]
    alone = subprocess.Popen([*command, *flags, *arguments, "--output_directory", str(tmp_path)])
    try:
        with served(*flags) as server:
            first = draw(server)
            hang_up(server)
            assert draw(server) == first
            assert '"stage": "cancelled"' in server.log.read_text() and server.health()[1]["restarts"] == 0
            ranks = server.ranks()
            assert server.terminate() in (0, -15, 143)
            assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks.values())
        assert alone.wait(PATIENCE) == 0
    finally:
        alone.kill()
    (made,) = tmp_path.glob("*.png")
    assert made.read_bytes() == first


def draw(server: Served) -> bytes:
    """Return an image's file, as OpenAI's client gets it."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    more = {"seed": SEED, "num_inference_steps": STEPS}
    answer = client.images.generate(prompt=PROMPT, extra_body=more)
    assert answer.data is not None and answer.data[0].b64_json is not None
    return base64.b64decode(answer.data[0].b64_json)


def hang_up(server: Served) -> None:
    """Ask for an image of many steps, leave, and see the server idle long before it could be done."""
    begun = time.monotonic()
    body = {"prompt": "a", "size": "256x256", "num_inference_steps": 150}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=1.0)
    server.until(lambda: "xfuser_serve_running 0.0" in server.http.get("/metrics").text, "cancelled")
    assert time.monotonic() - begun < 40
