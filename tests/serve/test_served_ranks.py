"""A server of two ranks: the images of `xfuser`, a cancel, an end that leaves nothing behind."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.support.served import PATIENCE, served

MODEL = ["--model", "tiny-sdxl", "--parallel", "otil", "--patch_degree", "2"]
PROMPT, SEED, STEPS = "a large red circle on the left, striped background", 11, 5


def test_openais_client_gets_what_xfuser_makes(tmp_path: Path) -> None:
    arguments = ["--prompt", PROMPT, "--seed", str(SEED), "--num_inference_steps", str(STEPS)]
    command = [sys.executable, "-c", "import sys; from otil_xdit.xdit.launcher.command import main; sys.exit(main())"]
    alone = subprocess.Popen([*command, *MODEL, *arguments, "--output_directory", str(tmp_path)], env={**os.environ})
    try:
        with served(*MODEL) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
            more = {"seed": SEED, "num_inference_steps": STEPS}

            def draw() -> bytes:
                answer = client.images.generate(model="tiny-sdxl", prompt=PROMPT, extra_body=more)
                assert answer.data is not None and answer.data[0].b64_json is not None
                return base64.b64decode(answer.data[0].b64_json)

            first = draw()
            begun = time.monotonic()
            with pytest.raises(httpx.ReadTimeout):  # the client hangs up
                httpx.post(
                    f"{server.url}/v1/images/generations",
                    json={"prompt": "a", "size": "256x256", "num_inference_steps": 150},
                    timeout=1.0,
                )
            assert draw() == first
            ranks = server.ranks()
            assert sorted(ranks) == [0, 1] and "cancelled" in server.log.read_text()
            seconds = time.monotonic() - begun
            assert seconds < PATIENCE / 4, f"the cancelled image was made to its end: {seconds:.0f} s"
            assert server.terminate() in (0, -15, 143)
            assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks.values())
        assert alone.wait(PATIENCE) == 0
    finally:
        alone.kill()
    (made,) = tmp_path.glob("*.png")
    assert made.read_bytes() == first
