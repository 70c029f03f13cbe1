"""OpenAI's images API against an engine without ranks: what is answered, what is refused, and with which field."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from otil_xdit.serve.app import create_app
from otil_xdit.serve.engine import EngineFailure, EngineStatus, Refused
from otil_xdit.serve.jobs import QueueFull
from otil_xdit.serve.settings import ServeSettings
from tests.support.fake_engine import FakeEngine, colour

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
SETTINGS = ServeSettings("tiny-sdxl", max_pixels=512 * 512, max_steps=50, max_images=4, max_body=200_000)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine, tmp_path: Path) -> Iterator[TestClient]:
    (tmp_path / "style.safetensors").write_bytes(b"")
    (tmp_path / "other.safetensors").write_bytes(b"")
    (tmp_path / "pickle.bin").write_bytes(b"")
    settings = ServeSettings(**{**vars(SETTINGS), "lora_dir": str(tmp_path)})
    with TestClient(create_app(engine, settings)) as made:
        yield made


def file_of(kind: str = "PNG", size: tuple[int, int] = (64, 64), mode: str = "RGB", **colours: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, **colours).save(file, kind)
    return file.getvalue()


def image_in(data: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))


def test_all_fields_reach_the_engine_and_the_image_comes_back(client: TestClient, engine: FakeEngine) -> None:
    body = {
        "model": "tiny-sdxl",
        "prompt": "a red circle",
        "negative_prompt": "blue",
        "n": 2,
        "size": "96x64",
        "seed": 5,
        "num_inference_steps": 3,
        "guidance_scale": 2.5,
        "scheduler": "euler",
        "lora": ["style:0.5", {"name": "other", "weight": 2}],
        "response_format": "b64_json",
        "user": "me",
    }
    answer = client.post(GENERATIONS, json=body)
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [one["seed"] for one in data] == [5, 6] and answer.json()["size"] == "96x64"
    assert [image_in(one).tobytes() for one in data] == [colour(seed, 96, 64).data for seed in (5, 6)]
    first = engine.asked[0]
    assert (first.prompt, first.negative_prompt, first.steps, first.guidance_scale) == ("a red circle", "blue", 3, 2.5)
    assert first.scheduler == "euler" and [(one.name, one.weight) for one in first.loras] == [
        ("style", 0.5),
        ("other", 2),
    ]


@pytest.mark.parametrize(("output_format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats_by_address(client: TestClient, output_format: str, kind: str) -> None:
    body = {"prompt": "a", "response_format": "url", "output_format": output_format, "output_compression": 90}
    url = client.post(GENERATIONS, json=body).json()["data"][0]["url"]
    file = client.get(url)
    assert file.headers["content-type"] == f"image/{output_format}"
    assert Image.open(io.BytesIO(file.content)).format == kind
    assert client.get("/v1/files/..%2F..%2Fetc%2Fpasswd").status_code == 404


def test_a_request_without_a_seed_gets_another_each_time_and_is_told(client: TestClient) -> None:
    seeds = {client.post(GENERATIONS, json={"prompt": "a"}).json()["data"][0]["seed"] for _ in range(4)}
    assert len(seeds) == 4


WRONG: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "no prompt": ({}, 400, "prompt"),
    "empty prompt": ({"prompt": ""}, 400, "prompt"),
    "prompt of another kind": ({"prompt": 7}, 400, "prompt"),
    "prompt that is no text": ({"prompt": "a\0b"}, 400, "prompt"),
    "long prompt": ({"prompt": "a" * 40_000}, 400, "prompt"),
    "unknown field": ({"prompt": "a", "seedd": 1}, 400, "seedd"),
    "another model": ({"prompt": "a", "model": "dall-e-3"}, 404, "model"),
    "size in words": ({"prompt": "a", "size": "large"}, 400, "size"),
    "size of odd numbers": ({"prompt": "a", "size": "100x100"}, 400, "size"),
    "size 0": ({"prompt": "a", "size": "0x64"}, 400, "size"),
    "too large": ({"prompt": "a", "size": "1024x1024"}, 400, "size"),
    "too many images": ({"prompt": "a", "n": 5}, 400, "n"),
    "no images": ({"prompt": "a", "n": 0}, 400, "n"),
    "too many steps": ({"prompt": "a", "num_inference_steps": 51}, 400, "num_inference_steps"),
    "negative seed": ({"prompt": "a", "seed": -1}, 400, "seed"),
    "seed of 20 digits": ({"prompt": "a", "seed": 10**20}, 400, "seed"),
    "guidance": ({"prompt": "a", "guidance_scale": -1}, 400, "guidance_scale"),
    "scheduler": ({"prompt": "a", "scheduler": "foo"}, 400, "scheduler"),
    "format": ({"prompt": "a", "output_format": "gif"}, 400, "output_format"),
    "unknown LoRA": ({"prompt": "a", "lora": "nobody"}, 400, "lora"),
    "path as LoRA": ({"prompt": "a", "lora": "../../etc/passwd"}, 400, "lora"),
    "LoRA by its file": ({"prompt": "a", "lora": "style.safetensors"}, 400, "lora"),
    "pickle as LoRA": ({"prompt": "a", "lora": "pickle"}, 400, "lora"),
    "LoRA twice": ({"prompt": "a", "lora": ["style", "style:2"]}, 400, "lora"),
    "heavy LoRA": ({"prompt": "a", "lora": "style:99"}, 400, "lora"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_is_named(client: TestClient, engine: FakeEngine, case: str) -> None:
    body, status, field = WRONG[case]
    answer = client.post(GENERATIONS, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, field), answer.text
    assert set(error) == {"message", "type", "param", "code"} and "Traceback" not in answer.text
    assert not engine.asked and "^" not in error["message"]


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": "a", "seed": 1e999}', b'"a"', b"[" * 9999]
)
def test_malformed_json(client: TestClient, body: bytes) -> None:
    answer = client.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "error" in answer.json(), answer.text


def test_a_large_body_is_refused_whether_it_says_so_or_not(client: TestClient) -> None:
    large = json.dumps({"prompt": "a" * 300_000}).encode()
    assert client.post(GENERATIONS, content=large).status_code == 413
    pieces = (large[start : start + 10_000] for start in range(0, len(large), 10_000))
    answer = client.post(GENERATIONS, content=pieces, headers={"content-type": "application/json"})
    assert answer.status_code == 413 and answer.json()["error"]["message"].startswith("the body has more than")


# ---- edits ----------------------------------------------------------------------------------------------------------


def test_an_edit_takes_the_images_size_and_openais_mask(client: TestClient, engine: FakeEngine) -> None:
    mask = Image.new("RGBA", (64, 48), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 48))
    file = io.BytesIO()
    mask.save(file, "PNG")
    files = {"image": file_of("JPEG", (64, 48), color=(9, 9, 9)), "mask": file.getvalue()}
    fields = {"prompt": "a", "strength": "0.5", "seed": "3", "lora": '[{"name": "style", "weight": 2}]'}
    answer = client.post(EDITS, data=fields, files=files)
    assert answer.status_code == 200, answer.text
    (asked,) = engine.asked
    assert asked.image is not None and asked.mask is not None
    assert (asked.width, asked.height, asked.strength, asked.seed) == (64, 48, 0.5, 3)
    assert asked.mask.data == (b"\xff" * 32 + b"\x00" * 32) * 48, "transparent is painted anew"
    assert [(one.name, one.weight) for one in asked.loras] == [("style", 2)]


def bomb() -> bytes:
    """A PNG of 20000 x 20000 pixels in a few kilobytes."""
    image = Image.new("1", (20_000, 20_000))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


WRONG_FILES: dict[str, tuple[dict[str, Any], dict[str, Any], int, str]] = {
    "no image": ({"prompt": "a"}, {}, 400, "image"),
    "no image at all": ({"prompt": "a"}, {"image": b"GIF89a nonsense"}, 400, "image"),
    "a format that is not read": ({"prompt": "a"}, {"image": file_of("BMP")}, 400, "image"),
    "cut off": ({"prompt": "a"}, {"image": file_of(size=(99, 99))[:60]}, 400, "image"),
    "bomb": ({"prompt": "a"}, {"image": bomb()}, 413, "image"),
    "mask": ({"prompt": "a"}, {"image": file_of(), "mask": b"x"}, 400, "mask"),
    "strength": ({"prompt": "a", "strength": "2"}, {"image": file_of()}, 400, "strength"),
    "strength in words": ({"prompt": "a", "strength": "much"}, {"image": file_of()}, 400, "strength"),
    "LoRA": ({"prompt": "a", "lora": '[{"name": 7}]'}, {"image": file_of()}, 400, "lora"),
    "field": ({"prompt": "a", "image_url": "file:///etc/passwd"}, {"image": file_of()}, 400, "image_url"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_edit_is_named(client: TestClient, engine: FakeEngine, case: str) -> None:
    fields, files, status, field = WRONG_FILES[case]
    answer = client.post(EDITS, data=fields, files=files or {"other": b""})
    if not files:
        answer = client.post(EDITS, data=fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, field), answer.text
    assert not engine.asked


# ---- streams --------------------------------------------------------------------------------------------------------


def events_of(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_stream_tells_steps_previews_and_the_image(client: TestClient) -> None:
    body = {"prompt": "a", "stream": True, "partial_images": 2, "seed": 3}
    events = events_of(client.post(GENERATIONS, json=body).text)
    kinds = [event["type"] for event in events]
    assert kinds[-1] == "image_generation.completed" and "image_generation.partial_image" in kinds
    assert image_in(events[-1]).tobytes() == colour(3, 128, 128).data
    assert all(event["steps"] == 4 for event in events[:-1])


def test_a_stream_ends_with_the_error(client: TestClient, engine: FakeEngine) -> None:
    engine.fault = EngineFailure("rank 1 was ended by SIGKILL")
    events = events_of(client.post(GENERATIONS, json={"prompt": "a", "stream": True}).text)
    assert "rank 1 was ended by SIGKILL" in events[-1]["error"]["message"]


# ---- faults and states ----------------------------------------------------------------------------------------------


def test_a_lost_image_is_answered_with_the_requests_id(client: TestClient, engine: FakeEngine) -> None:
    engine.fault = EngineFailure("rank 1 was ended by SIGKILL")
    answer = client.post(GENERATIONS, json={"prompt": "a"})
    assert answer.status_code == 500 and answer.headers["x-request-id"] in answer.json()["error"]["message"]
    assert client.post(GENERATIONS, json={"prompt": "a"}).status_code == 200


def test_what_the_model_refuses_is_422(client: TestClient, engine: FakeEngine) -> None:
    engine.fault = Refused("height 8 cannot be cut into 2 patches")
    answer = client.post(GENERATIONS, json={"prompt": "a"})
    assert answer.status_code == 422 and "cannot be cut" in answer.json()["error"]["message"]


def test_a_fault_of_the_server_shows_no_traceback(client: TestClient, engine: FakeEngine) -> None:
    engine.fault = KeyError("secret")
    answer = client.post(GENERATIONS, json={"prompt": "a"})
    assert answer.status_code == 500 and "secret" not in answer.text


@pytest.mark.parametrize("state", ["loading", "restarting", "failed"])
def test_not_ready_is_503_and_health_says_why(client: TestClient, engine: FakeEngine, state: Any) -> None:
    engine.status = EngineStatus(state, "rank 1 says nothing, last seen at layer mid_block at step 3")
    answer, health = client.post(GENERATIONS, json={"prompt": "a"}), client.get("/health")
    assert answer.status_code == health.status_code == 503
    assert "rank 1" in answer.json()["error"]["message"] and "mid_block" in health.json()["reason"]
    assert client.get("/liveness").status_code == 200
    assert ("retry-after" in answer.headers) == (state != "failed")
    assert "xfuser_serve_ready 0.0" in client.get("/metrics").text


@pytest.mark.parametrize("route", [GENERATIONS, EDITS])
def test_a_full_queue_is_429_and_says_when(client: TestClient, engine: FakeEngine, route: str) -> None:
    def full() -> None:
        raise QueueFull(12.3)

    service = client.app.state.service  # type: ignore[attr-defined]
    service.jobs.check_room = full
    body: dict[str, Any] = {"json": {"prompt": "a"}}
    if route == EDITS:  # refused before the image is looked at
        body = {"data": {"prompt": "a"}, "files": {"image": b"no image"}}
    answer = client.post(route, **body)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "13"
    assert answer.json()["error"]["type"] == "rate_limit_error" and not engine.asked


def test_the_key(engine: FakeEngine) -> None:
    settings = ServeSettings("tiny-sdxl", api_key="sesame")
    with TestClient(create_app(engine, settings)) as client:
        wrong = [{}, {"authorization": "Bearer open"}, {"authorization": "sesame"}, {"authorization": "Basic !"}]
        for headers in wrong:
            answer = client.post(GENERATIONS, json={"prompt": "a"}, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
        assert client.get("/v1/models").status_code == client.get("/docs").status_code == 401
        assert client.get("/health").status_code == 200
        basic = base64.b64encode(b"me:sesame").decode()
        for right in ("Bearer sesame", f"Basic {basic}"):
            assert client.get("/v1/models", headers={"authorization": right}).status_code == 200


def test_the_model_has_its_served_name(engine: FakeEngine) -> None:
    settings = ServeSettings("tiny-sdxl", served_model_name="org/painter")
    with TestClient(create_app(engine, settings)) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "org/painter"
        assert client.get("/v1/models/org/painter").status_code == 200
        assert client.get("/v1/models/tiny-sdxl").status_code == 404
        assert client.post(GENERATIONS, json={"prompt": "a", "model": "tiny-sdxl"}).status_code == 404
        assert client.post(GENERATIONS, json={"prompt": "a", "model": "org/painter"}).status_code == 200


def test_metrics_count(client: TestClient) -> None:
    client.post(GENERATIONS, json={"prompt": "a", "n": 3})
    client.post(GENERATIONS, json={})
    text = client.get("/metrics").text
    assert "xfuser_serve_images_total 3.0" in text and "xfuser_serve_sent_bytes_total 300.0" in text
    assert f'xfuser_serve_requests_total{{route="{GENERATIONS}",status="400"}} 1.0' in text
