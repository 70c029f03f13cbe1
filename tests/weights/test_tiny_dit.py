"""The main job on the shipped model: exact when synchronous, close when not, the promised bytes, always the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.torchrun import lines_of

ROOT = Path(__file__).parents[2]
EXACT = 1e-4
"""Latents have unit scale; float32 sums in another order differ by about 1e-6 a step."""


def torchrun(ranks: int, *command: str, timeout: int = 240) -> str:
    """The standard output of a torchrun on `ranks` processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def measured(ranks: int, *flags: str) -> dict[str, Any]:
    return lines_of(ranks, "tiny_dit.py", *flags)[-1]


@pytest.fixture(scope="module")
def on_two() -> dict[str, Any]:
    return measured(2)


def test_synchronous_is_one_process(on_two: dict[str, Any]) -> None:
    assert on_two["sync"]["max_error"] <= EXACT
    assert on_two["naive"]["max_error"] > 100 * EXACT, "the exchange makes no difference: the line above shows nothing"


def test_cfg_times_patch_is_one_process() -> None:
    assert measured(4, "--cfg")["sync"]["max_error"] <= EXACT


def test_an_eighth_sends_an_eighth(on_two: dict[str, Any]) -> None:
    everything = on_two["distrifusion"]["kv_bytes_per_step"]
    for name, most in (("paper 1/2", 0.51), ("paper 1/8", 0.135), ("paper 1/8 by keys", 0.135)):
        assert 0.08 < on_two[name]["kv_bytes_per_step"] / everything <= most, name
    assert on_two["otil"]["kv_bytes_per_step"] < everything / 16
    assert on_two["naive"]["kv_bytes_per_step"] == 0
    assert on_two["sync"]["kv_bytes_per_step"] == everything


def test_more_bytes_are_closer(on_two: dict[str, Any]) -> None:
    errors = [
        on_two[name]["mean_error"]
        for name in ("naive", "paper 1/8", "paper 1/2", "distrifusion", "otil", "high", "sync")
    ]
    assert errors == sorted(errors, reverse=True), errors


def test_same_image_every_time_whatever_came_between(on_two: dict[str, Any]) -> None:
    first, other, again = on_two["again"]
    assert first == again != other


def images(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


@pytest.mark.slow
def test_without_a_strategy_it_is_xdit(tmp_path: Path) -> None:
    """Ulysses on two ranks: through the launcher and its hooks, and through xfuser's runner without them."""
    job = ["--model", "tiny-dit", "--prompt", "a large red circle on the left, striped background"]
    job += ["--num_inference_steps", "4", "--ulysses_degree", "2", "--output_directory"]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    launcher = [sys.executable, "-m", "otil_xdit", *job, str(ours), "--master_port", "29655"]
    subprocess.run(launcher, cwd=ROOT, check=True, capture_output=True, timeout=240)
    torchrun(2, "tests/workers/plain_xdit.py", *job, str(theirs))
    assert images(ours) == images(theirs) != []
