"""AUTOMATIC1111's API against an engine without ranks."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from otil_xdit.serve.app import create_app
from otil_xdit.serve.settings import ServeSettings
from tests.support.fake_engine import FakeEngine, colour

API = "/sdapi/v1"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine, tmp_path: Path) -> Iterator[TestClient]:
    (tmp_path / "style.safetensors").write_bytes(b"")
    with TestClient(create_app(engine, ServeSettings("tiny-sdxl", lora_dir=str(tmp_path)))) as made:
        yield made


def picture(mode: str = "RGB", colour: Any = 0) -> str:
    file = io.BytesIO()
    Image.new(mode, (64, 64), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def pixels(coded: str) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(coded))).tobytes()


def test_text_to_image(client: TestClient, engine: FakeEngine) -> None:
    body = {
        "prompt": "a red circle <lora:style:0.5>",
        "negative_prompt": "blue",
        "seed": 5,
        "steps": 3,
        "cfg_scale": 2.5,
        "width": 96,
        "height": 64,
        "sampler_name": "Euler",
        "scheduler": "Automatic",
        "batch_size": 2,
        "save_images": True,
        "enable_hr": False,
        "styles": [],
    }
    answer = client.post(f"{API}/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    values = answer.json()
    assert [pixels(one) for one in values["images"]] == [colour(seed, 96, 64).data for seed in (5, 6)]
    assert json.loads(values["info"])["all_seeds"] == [5, 6] and values["parameters"]["steps"] == 3
    first = engine.asked[0]
    assert (first.prompt, first.negative_prompt, first.steps) == ("a red circle", "blue", 3)
    assert first.scheduler == "euler" and [(one.name, one.weight) for one in first.loras] == [("style", 0.5)]


def test_image_to_image(client: TestClient, engine: FakeEngine) -> None:
    body = {"prompt": "a", "init_images": [f"data:image/png;base64,{picture()}"], "mask": picture("L", 255)}
    for invert in (0, 1):
        answer = client.post(f"{API}/img2img", json={**body, "inpainting_mask_invert": invert})
        assert answer.status_code == 200, answer.text
    masks = [one.mask.data[:1] for one in engine.asked if one.mask is not None]
    assert masks == [b"\xff", b"\x00"] and engine.asked[0].strength == 0.75


WRONG: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "sampler": ("txt2img", {"sampler_name": "Foo"}, 400, "sampler_name"),
    "schedule": ("txt2img", {"scheduler": "Karras"}, 422, "scheduler"),
    "upscaling": ("txt2img", {"enable_hr": True}, 422, "enable_hr"),
    "scripts": ("txt2img", {"alwayson_scripts": {"a": {}}}, 422, "alwayson_scripts"),
    "another model": ("txt2img", {"override_settings": {"sd_model_checkpoint": "x"}}, 422, "the model here"),
    "settings": ("txt2img", {"override_settings": 5}, 400, "override_settings"),
    "half of a letter": ("txt2img", {"negative_prompt": "\ud800"}, 400, "negative_prompt"),
    "steps": ("txt2img", {"steps": 0}, 400, "steps"),
    "LoRA": ("txt2img", {"prompt": "<lora:../../x:1>"}, 400, "LoRA of this server"),
    "address": ("img2img", {"init_images": ["http://localhost/a.png"]}, 400, "init_images"),
    "path": ("img2img", {"init_images": ["/etc/passwd"]}, 400, "init_images"),
    "no image": ("img2img", {"init_images": []}, 400, "init_images"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused_is_named_where_these_programs_look(client: TestClient, engine: FakeEngine, case: str) -> None:
    route, more, status, text = WRONG[case]
    body = json.dumps({"prompt": "a", **more})  # httpx writes no escapes, which halves of letters need
    answer = client.post(f"{API}/{route}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status and text in answer.json()["detail"], answer.text
    assert not engine.asked


def test_progress_and_interrupt(client: TestClient, engine: FakeEngine) -> None:
    idle = client.get(f"{API}/progress").json()
    assert idle["progress"] == 0 and idle["current_image"] is None
    engine.gate.clear()
    answers = []
    caller = threading.Thread(
        target=lambda: answers.append(client.post(f"{API}/txt2img", json={"prompt": "a", "steps": 4, "n_iter": 2}))
    )
    caller.start()
    deadline = time.monotonic() + 10
    while (now := client.get(f"{API}/progress").json())["state"]["sampling_step"] < 3:
        assert time.monotonic() < deadline
    assert now["progress"] == 0.375 and now["current_image"] and now["state"]["sampling_steps"] == 4
    assert client.get(f"{API}/progress?skip_current_image=true").json()["current_image"] is None
    assert client.post(f"{API}/interrupt").json() == {}
    caller.join(10)
    assert answers[0].status_code == 200 and answers[0].json()["images"] == []
    assert json.loads(answers[0].json()["info"])["interrupted"]
    assert client.post(f"{API}/interrupt").status_code == 200, "without an image nothing happens"


def test_lists(client: TestClient) -> None:
    assert client.get(f"{API}/sd-models").json()[0]["title"] == "tiny-sdxl"
    assert [one["name"] for one in client.get(f"{API}/samplers").json()] == ["Euler", "DDIM"]
    assert [one["name"] for one in client.get(f"{API}/loras").json()] == ["style"]
    assert client.get(f"{API}/options").json()["sd_model_checkpoint"] == "tiny-sdxl"
    assert client.post(f"{API}/options", json={"sd_model_checkpoint": "tiny-sdxl"}).status_code == 200
    assert client.post(f"{API}/options", json={"sd_model_checkpoint": "other"}).status_code == 422
    assert client.get(f"{API}/upscalers").json() == []
