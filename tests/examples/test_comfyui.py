"""The nodes for ComfyUI, loaded and called as ComfyUI's documentation has it, against an engine without ranks."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from otil_xdit.serve.app import create_app
from otil_xdit.serve.settings import ServeSettings
from tests.support.app_thread import app_in_a_thread
from tests.support.fake_engine import FakeEngine, colour

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "comfyui"


@pytest.fixture(scope="module")
def nodes() -> dict[str, Any]:
    """The nodes by name: a folder is a module that is loaded from its file, under a name that is no identifier."""
    name = "/somewhere/custom_nodes/xfuser-server"
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(module.NODE_CLASS_MAPPINGS)
    return dict(module.NODE_CLASS_MAPPINGS)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def address(engine: FakeEngine) -> Iterator[str]:
    with app_in_a_thread(create_app(engine, ServeSettings("tiny-sdxl", max_images=4))) as made:
        yield made


def call(node: Any, **values: Any) -> Any:
    """Call a node as a workflow does: its inputs' defaults, and what other nodes give."""
    types = node.INPUT_TYPES()
    defaults = {name: more["default"] for name, (_, more) in types["required"].items() if "default" in more}
    (image,) = getattr(node(), node.FUNCTION)(**{**defaults, **values})
    assert image.dtype == torch.float32 and image.dim() == 4 and image.shape[-1] == 3
    return image


def image_of(seed: int, width: int, height: int) -> torch.Tensor:
    values = torch.frombuffer(bytearray(colour(seed, width, height).data), dtype=torch.uint8)
    return values.view(height, width, 3).float() / 255


def test_the_contract(nodes: dict[str, Any]) -> None:
    for node in nodes.values():
        types = node.INPUT_TYPES()
        inputs = {**types["required"], **types["optional"]}
        assert set(types) == {"required", "optional"} and node.RETURN_TYPES == ("IMAGE",) and node.CATEGORY
        for kind, more in inputs.values():
            assert kind in ("STRING", "INT", "FLOAT", "IMAGE", "MASK")
            assert ("default" in more) == (kind not in ("IMAGE", "MASK"))
            if kind in ("INT", "FLOAT"):
                assert more["min"] <= more["default"] <= more["max"]
        parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters.values()
        named = {one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD} - {"self"}
        needed = {one.name for one in parameters if one.default is one.empty and one.name in named}
        assert named <= set(inputs) and needed <= set(types["required"])


def test_a_prompt_gives_images(nodes: dict[str, Any], address: str, engine: FakeEngine) -> None:
    more = {"negative_prompt": "blue", "steps": 3, "guidance": 2.5, "scheduler": "euler"}
    node = nodes["XfuserTextToImage"]
    made = call(node, server=address, prompt="a red circle", width=96, height=64, seed=300, images=2, **more)
    assert torch.equal(made, torch.stack([image_of(seed, 96, 64) for seed in (300, 301)]))
    asked = engine.asked[0]
    assert (asked.prompt, asked.negative_prompt, asked.steps) == ("a red circle", "blue", 3)
    assert (asked.guidance_scale, asked.scheduler) == (2.5, "euler")
    assert call(node, server=address, prompt="a").shape == (1, 128, 128, 3)
    assert (engine.asked[-1].steps, engine.asked[-1].negative_prompt) == (None, None)


def test_an_image_and_a_mask_reach_the_server(nodes: dict[str, Any], address: str, engine: FakeEngine) -> None:
    images = torch.stack([image_of(seed, 64, 32) for seed in (1000, 2000)])
    mask = torch.zeros(1, 32, 64)
    mask[:, :, 40:] = 1
    node = nodes["XfuserImageToImage"]
    made = call(node, server=address.removeprefix("http://"), prompt="a", image=images, mask=mask, strength=0.5)
    assert made.shape == (2, 32, 64, 3)
    for asked, seed in zip(engine.asked, (1000, 2000), strict=True):
        assert asked.image is not None and asked.mask is not None
        assert asked.image.data == colour(seed, 64, 32).data and asked.strength == 0.5
        assert asked.mask.data == (bytes(40) + b"\xff" * 24) * 32
    call(node, server=address, prompt="a", image=images[:1])
    assert engine.asked[-1].mask is None


class Stopped(Exception):
    """What ComfyUI raises when its stop button was pressed."""


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """ComfyUI's progress bar and stop button; what was shown, and whether it is pressed."""
    seen: dict[str, Any] = {"steps": [], "stop": threading.Event()}

    class ProgressBar:
        def __init__(self, total: int) -> None:
            pass

        def update_absolute(self, value: int, total: int, preview: Any = None) -> None:
            seen["steps"].append((value, total, preview))
            if value == 3:
                seen["at three"]()

    def throw() -> None:
        if seen["stop"].is_set():
            raise Stopped

    made = {name: ModuleType(name) for name in ("comfy", "comfy.utils", "comfy.model_management")}
    vars(made["comfy.utils"])["ProgressBar"] = ProgressBar
    vars(made["comfy.model_management"])["throw_exception_if_processing_interrupted"] = throw
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_progress_and_previews(nodes: dict[str, Any], address: str, engine: FakeEngine, comfy: dict[str, Any]) -> None:
    engine.gate.clear()
    comfy["at three"] = engine.gate.set
    call(nodes["XfuserTextToImage"], server=address, prompt="a")
    last = comfy["steps"][-1]
    assert last[:2] == (4, 4) or last[:2] == (3, 4)
    kind, preview, _ = next(preview for _, _, preview in comfy["steps"] if preview is not None)
    assert kind == "JPEG" and preview.size == (8, 8)


def test_the_stop_button(nodes: dict[str, Any], address: str, engine: FakeEngine, comfy: dict[str, Any]) -> None:
    engine.gate.clear()
    comfy["at three"] = comfy["stop"].set
    with pytest.raises(Stopped):
        call(nodes["XfuserTextToImage"], server=address, prompt="a")
    engine.gate.set()
    comfy["stop"].clear()
    comfy["at three"] = lambda: None
    call(nodes["XfuserTextToImage"], server=address, prompt="a")
    assert engine.cancels == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prompt": ""}, "prompt: "),
        ({"images": 5}, "at most 4 images"),
        ({"lora": "none"}, "not a LoRA of this server"),
        ({"server": "http://127.0.0.1:1"}, "does not answer"),
        ({"server": "ftp://127.0.0.1"}, "give an address like"),
        ({"width": 64}, "give width and height"),
    ],
)
def test_what_is_wrong_is_said(nodes: dict[str, Any], address: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=said):
        call(nodes["XfuserTextToImage"], **{"server": address, "prompt": "a", **values})


def test_the_key(nodes: dict[str, Any], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with app_in_a_thread(create_app(engine, ServeSettings("tiny-sdxl", api_key="secret"))) as address:
        with pytest.raises(RuntimeError, match="bearer token"):
            call(nodes["XfuserTextToImage"], server=address, prompt="a")
        monkeypatch.setenv("XFUSER_SERVE_API_KEY", "secret")
        call(nodes["XfuserTextToImage"], server=address, prompt="a")
