"""Faults on real ranks: every other rank stops soon and says who failed; what can go on does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def table(*flags: str, timeout: float = 550) -> list[list[str]]:
    """The cells of `faults.py`'s rows; fails where one of them is not as it should be."""
    command = [sys.executable, "tests/workers/faults.py", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert done.returncode == 0 and len(rows) > 1, done.stdout + done.stderr[-6000:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1:]]


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    """A row each of some kinds, on two ranks."""
    kinds = ["kill", "layer", "callbacks", "nan", "seed", "forward"]
    return {row[1]: row for row in table("--ranks", "2", "--each", "1", "--only", *kinds)}


def test_a_rank_that_dies_is_named_with_layer_and_step(said: dict[str, list[str]]) -> None:
    assert "rank 1 says nothing, so it has died" in said["SIGKILL"][7]
    assert " at step 6 " in said["SIGKILL"][7] and said["SIGKILL"][9] == "refused"


def test_the_exception_of_one_rank_is_told_to_all(said: dict[str, list[str]]) -> None:
    row = said["exception in a layer"]
    assert "rank 0 failed: ValueError: a fault in a layer (after " in row[7] and row[9] == "refused"


def test_an_exception_of_all_leaves_the_pipeline_usable(said: dict[str, list[str]]) -> None:
    assert said["exception in all ranks' callbacks"][9] == "same image"


def test_nan_is_traced_to_its_rank(said: dict[str, list[str]]) -> None:
    assert "rank 0 stops with rank 1: NaN or Inf among this rank's numbers in " in said["NaN in an activation"][7]


def test_a_difference_is_an_error_everywhere(said: dict[str, list[str]]) -> None:
    assert "generator is seed 3" in said["another seed"][7] and said["another seed"][9] == "same image"


def test_what_one_rank_refuses_is_told_to_all_before_the_first_step(said: dict[str, list[str]]) -> None:
    row = said["a step cache on one rank"]
    assert re.search(r"ValueError: rank (\d): rank (\d) refuses: .* has a forward that has been replaced", row[7])
    assert row[9] == "same image"


@pytest.mark.slow
def test_all_faults() -> None:
    assert len(table(timeout=1200)) >= 40


@pytest.mark.slow
def test_all_faults_through_the_launcher() -> None:
    assert len(table("--launcher", timeout=1200)) >= 10
