"""One server of two ranks, asked for everything that it makes: LoRA, schedulers, edits, streams, batches."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from otil_xdit.catalog.bundled import model_folder
from tests.support.served import Served, served

pytestmark = pytest.mark.slow

SMALL = {"seed": 3, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("lora")
    shutil.copy(Path(model_folder("tiny-sd-lora")) / "pytorch_lora_weights.safetensors", folder / "style.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no tensors")
    flags = "--model tiny-sd --parallel otil --patch_degree 2 --max_batch 3 --lora_dir"
    with served(*flags.split(), str(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def plain(server: Served) -> str:
    return server.image(**SMALL)


def values(image: str) -> np.ndarray:
    """An image's numbers."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")).astype(int)


def test_lora_is_of_its_image_only(server: Served, plain: str) -> None:
    styled, half = server.image(**SMALL, lora="style"), server.image(**SMALL, lora="style:0.5")
    assert server.image(**SMALL) == plain
    assert len({plain, styled, half}) == 3
    assert server.image(**SMALL, lora={"name": "style"}) == styled
    broken = server.draw(**SMALL, lora="broken")
    assert broken.status_code == 422 and "broken" in broken.json()["error"]["message"]
    assert server.image(**SMALL) == plain


def test_schedulers_steps_and_sizes_are_of_their_image_only(server: Served, plain: str) -> None:
    for more in ({"scheduler": "euler"}, {"size": "64x96"}, {"guidance_scale": 1.0}, {"num_inference_steps": 7}):
        assert server.image(**{**SMALL, **more}) != plain
    assert server.image(**SMALL) == plain


def test_edits(server: Served, plain: str) -> None:
    picture = base64.b64decode(plain)
    mask = Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 64, 128))
    file = io.BytesIO()
    mask.save(file, "PNG")
    fields = {"prompt": "a blue square", "seed": "1", "num_inference_steps": "6"}

    def edit(files: dict[str, bytes], **more: str) -> str:
        answer = server.http.post("/v1/images/edits", data={**fields, **more}, files=files)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["data"][0]["b64_json"])

    little, much = (edit({"image": picture}, strength=strength) for strength in ("0.3", "1.0"))
    changes = [np.abs(values(made) - values(plain)).mean() for made in (little, much)]
    assert changes[0] < changes[1]
    painted = np.abs(values(edit({"image": picture, "mask": file.getvalue()})) - values(plain))
    assert painted[:, :48].mean() > 2 * painted[:, 80:].mean()
    assert edit({"image": picture}, strength="0.3") == little and server.image(**SMALL) == plain


def test_a_stream_ends_with_the_same_image(server: Served, plain: str) -> None:
    body: dict[str, Any] = {"prompt": "a large red circle", **SMALL, "stream": True, "partial_images": 2}
    lines = server.http.post("/v1/images/generations", json=body).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-1]["b64_json"] == plain
    previews = [event for event in events if event["type"] == "image_generation.partial_image"]
    assert len(previews) == 2 and values(previews[0]["b64_json"]).std() > 0


def test_a_batch_is_within_rounding_of_its_images(server: Served) -> None:
    answer = server.draw(**SMALL, n=3)
    assert answer.status_code == 200, answer.text
    for number, data in enumerate(answer.json()["data"]):
        alone = server.image(**{**SMALL, "seed": SMALL["seed"] + number})
        error = np.mean((values(alone) - values(data["b64_json"])) ** 2.0)
        assert data["seed"] == SMALL["seed"] + number and error < 1.0, error  # of 255 squared: 48 dB
