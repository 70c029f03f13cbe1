"""The shipped LoRA: it changes tiny-sd's images, the ranks make the changed image, and it is no model by itself."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from safetensors import safe_open

from otil_xdit.catalog.bundled import BUNDLED_UNETS, model_folder
from tests.support.torchrun import lines_of

FOLDER = Path(model_folder("tiny-sd-lora"))


@cache
def found() -> dict[str, Any]:
    (line,) = lines_of(2, "tiny_lora.py", timeout=480)
    return line


def test_two_ranks_draw_what_one_process_draws() -> None:
    assert found()["unwrapped"] == []
    # Values are 0..1; float32 through six steps with guidance, then the VAE.
    assert found()["max_error"] <= 1e-4


def test_shapes_have_golden_rims() -> None:
    plain, alone, together = found()["yellow"]
    assert plain < 0.01, "the prompt has nothing yellow"
    assert alone > 0.04 and together > 0.04
    assert found()["changed_by_lora"] > 0.2


def test_adapters_of_convolutions_add_no_messages() -> None:
    # Six synchronous steps; 52 convolutions, 61 norms, 45 pairs of them.
    counts = found()["messages"]
    sent = sum(sum(counts.get(kind, {}).values()) for kind in ("halo", "moments"))
    assert sent == 6 * (52 + 61 - 45)


def test_the_file_is_small_and_float16() -> None:
    (weights,) = FOLDER.glob("*.safetensors")
    assert weights.stat().st_size < 600_000
    with safe_open(weights, framework="pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # not a dict
        convolutions = [name for name in file.keys() if ".conv1." in name]  # noqa: SIM118
    assert kinds == {"F16"} and convolutions


def test_it_is_not_listed_as_a_model() -> None:
    assert (FOLDER / "README.md").exists() and not (FOLDER / "model_index.json").exists()
    assert "tiny-sd-lora" not in BUNDLED_UNETS
