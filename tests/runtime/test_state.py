"""Pipelines that live long, on real ranks: every image is a fresh pipeline's, and `restore` leaves nothing behind."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.torchrun import lines_of

KINDS = ("unet", "dit")


@pytest.fixture(scope="module")
def found() -> dict[str, list[Any]]:
    return {line["name"]: line["ranks"] for line in lines_of(2, "state.py")}


def check_images(ranks: list[dict[str, Any]]) -> None:
    """Calls of every kind, after images of other kinds that were broken off in every way."""
    for rank in ranks:
        assert rank["wrong"] == [] and rank["compared"] >= 6
        assert rank["like plain"] in (["plain"], []), "a call that changes nothing shows nothing"
    assert any(rank["like plain"] for rank in ranks), "no rank had images"


def test_every_image_is_that_of_a_fresh_pipeline(found: dict[str, list[Any]]) -> None:
    check_images(found["unet, otil"])


@pytest.mark.parametrize("kind", KINDS)
def test_restore_leaves_the_pipeline_as_it_was(kind: str, found: dict[str, list[Any]]) -> None:
    for rank in found[f"{kind}, restored"]:
        assert rank["while"] == [True, True], "parallelize changed nothing that this test sees"
        assert rank["changed"] == [] and rank["same image"] == [True, True] and rank["buffers"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_that_means_nothing_is_refused_before_anything_is_sent(kind: str, found: dict[str, list[Any]]) -> None:
    for rank in found[f"{kind}, score"]:
        assert "dhash needs sub-blocks of at least 2 x 2 tokens" in rank["refused"] and rank["messages"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_told_before_and_after(kind: str, found: dict[str, list[Any]]) -> None:
    """What is told before is about what buffers take, and what is told after is what they do take."""
    first, second = found[f"{kind}, told"]
    before, after = first["lines"]
    expected = float(re.search(r"about ([\d.]+) MB on each rank", before)[1])
    assert float(re.search(r"buffers ([\d.]+) MB", after)[1]) == pytest.approx(first["buffers"], abs=0.06)
    # Before, nobody knows how long the prompt will be: the architecture's longest is assumed.
    assert first["buffers"] * 0.97 <= expected <= first["buffers"] * 1.15
    assert second["lines"] == []


def test_a_dit_and_a_unet_take_turns(found: dict[str, list[Any]]) -> None:
    assert found["side by side"] == [[True] * 4] * 2


def test_the_clock_knows_that_an_image_ends_early(found: dict[str, list[Any]]) -> None:
    for whole, steps, half, half_steps in found["denoising_end"]:
        assert whole == steps == 8 and half == half_steps == 4


def test_groups_for_other_degrees_are_made_once_a_pipeline_is_restored(found: dict[str, list[Any]]) -> None:
    for rank in found["other degrees"]:
        assert "which other pipelines use" in rank["refused"]
        assert [rank["ours"], rank["xDiT"]] == [[1, 1], [1, 2]], "groups of a restored pipeline"
        assert rank["ours: groups"] == rank["xDiT: groups"], "groups of pipelines in between are left"
    for name in ("ours", "xDiT"):
        errors = [rank[f"{name}: error"] for rank in found["other degrees"]]
        assert max(error for error in errors if error is not None) < 1e-3, "rounding is 1.1e-4"


@pytest.mark.slow
def test_every_kind_of_call_after_every_other() -> None:
    found = {line["name"]: line["ranks"] for line in lines_of(2, "state.py", "--all", timeout=1800)}
    for name in ("unet, otil", "unet, paper", "dit, otil", "dit, paper"):
        check_images(found[name])
