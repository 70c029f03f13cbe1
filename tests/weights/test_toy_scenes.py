"""The toy scenes, their analytic reader, and the shipped tiny pipeline folder's form."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "otil_xdit" / "weights" / "tiny-dit"
COUNT = 300


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "train"))
    yield importlib.import_module("scenes")
    sys.modules.pop("scenes")


def drawn(scenes: ModuleType, count: int, things: int | None = None) -> list[tuple[np.ndarray, object]]:
    rng = np.random.default_rng(7)
    chosen = [scenes.sample(rng, things) for _ in range(count)]
    return [(scenes.draw(scene, rng), scene) for scene in chosen]


def share_right(scenes: ModuleType, pairs: list[tuple[np.ndarray, object]]) -> float:
    return float(np.mean([scenes.read(image, scene)["right"] for image, scene in pairs]))


def other(names: list[str], name: str) -> str:
    return names[(names.index(name) + 1) % len(names)]


def test_captions_round_trip(scenes):
    rng = np.random.default_rng(3)
    for _ in range(COUNT):
        scene = scenes.sample(rng)
        assert scenes.parse(scene.caption()) == scene


def test_captions_use_the_vocabulary(scenes):
    rng, words = np.random.default_rng(4), set(scenes.vocabulary())
    for _ in range(COUNT):
        assert set(scenes.sample(rng).caption().replace(",", " ,").split()) <= words


def test_parse_refuses_other_text(scenes):
    with pytest.raises(ValueError):
        scenes.parse("a cat on a mat")


def test_drawing_is_repeatable(scenes):
    first, second = scenes.draw_many(3, 5), scenes.draw_many(3, 5)
    assert first[1] == second[1] and np.array_equal(first[0], second[0])


def test_reader_accepts_drawn_scenes(scenes):
    pairs = drawn(scenes, COUNT)
    assert share_right(scenes, pairs) >= 0.98
    assert np.mean([scenes.read(image, scene)["size"] for image, scene in pairs]) >= 0.98


@pytest.mark.parametrize("field", ["shape", "colour", "place"])
def test_reader_rejects_one_wrong_attribute(scenes, field):
    names = {"shape": list(scenes.SHAPES), "colour": list(scenes.COLOURS), "place": list(scenes.PLACES)}[field]

    def wrong(scene):
        first, *rest = scene.things
        changed = replace(first, **{field: other(names, getattr(first, field))})
        return replace(scene, things=(changed, *rest))

    assert share_right(scenes, [(image, wrong(scene)) for image, scene in drawn(scenes, COUNT)]) <= 0.02


@pytest.mark.parametrize("field", ["colour", "place"])
def test_reader_rejects_swaps(scenes, field):
    def swapped(scene):
        first, second = scene.things
        values = {field: getattr(second, field)}, {field: getattr(first, field)}
        return replace(scene, things=(replace(first, **values[0]), replace(second, **values[1])))

    pairs = drawn(scenes, COUNT, things=2)
    if field == "colour":  # two alike but for the colour, swapped, are told apart by place alone
        pairs = [(p, s) for p, s in pairs if s.things[0].shape != s.things[1].shape]
    assert share_right(scenes, [(image, swapped(scene)) for image, scene in pairs]) <= 0.02


def test_reader_rejects_a_missing_and_an_added_shape(scenes):
    pairs = drawn(scenes, 50, things=2)
    rng = np.random.default_rng(1)
    halves = [replace(scene, things=scene.things[:1]) for _, scene in pairs]
    missing = [(scenes.draw(half, rng), scene) for half, (_, scene) in zip(halves, pairs, strict=True)]
    added = [(image, half) for (image, _), half in zip(pairs, halves, strict=True)]
    assert share_right(scenes, missing) == 0 and share_right(scenes, added) == 0


def test_shipped_folder_is_small_and_safe():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png", ".txt"}


def test_shipped_weights_are_float16():
    safetensors = pytest.importorskip("safetensors")
    paths = list(FOLDER.rglob("*.safetensors"))
    assert len(paths) == 4
    for path in paths:
        with safetensors.safe_open(path, framework="pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, path
