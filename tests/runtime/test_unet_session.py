"""A pipeline with a U-Net on real ranks: the same image every time and everywhere, whatever came between."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.torchrun import lines_of


@pytest.fixture(scope="module")
def found() -> dict[str, list[Any]]:
    (line,) = lines_of(2, "unet_session.py")
    return line


def test_same_image_on_every_rank_and_every_time(found: dict[str, list[Any]]) -> None:
    first, second = found["repeats"]
    assert first[:2] == second[:2] and first[0] == first[1], "the first image came out differently the second time"
    assert first == second and len(set(first[1:])) == 4


def test_without_a_generator_all_ranks_draw_as_the_first(found: dict[str, list[Any]]) -> None:
    first, second = found["noise"]
    assert first == second and first[0] != first[1]


def test_an_idle_server_lives(found: dict[str, list[Any]]) -> None:
    assert found["idle"] == [True, True]


def test_an_interrupted_generation_leaves_nothing(found: dict[str, list[Any]]) -> None:
    assert found["interrupted"] == [True, True]


def test_two_pipelines_may_share_a_network(found: dict[str, list[Any]]) -> None:
    for rank in found["shared_network"]:
        assert rank == {"same again": True, "sync exact": True, "frozen not": True, "undone": True}


def test_detach_undoes_everything(found: dict[str, list[Any]]) -> None:
    assert found["undone"] == [{"wrapped": True, "restored": True, "same": True}] * 2


def test_halo_and_moments_are_counted_where_they_are_sent(found: dict[str, list[Any]]) -> None:
    for rank in found["counted"]:
        assert rank["counted"] == rank["expected"] > 0
    assert found["counted"][0] != found["counted"][1], "at stride 2 only the upper rank sends"


def test_a_summary_says_what_was_done(found: dict[str, list[Any]]) -> None:
    for rank in found["counted"]:
        buffers, steps = rank["made"]
        before, after, undone = (said.splitlines() for said in rank["said"])
        assert before == [
            "pipeline: StableDiffusionPipeline",
            "strategy: otil",
            "ranks of an image: 2 patches x 1 Ulysses x 1 CFG",
            "unet: 52 convolutions (halo rows), 61 group norms (moments), 16 self-attentions (keys and values)",
            "buffers: none yet, the first image makes them",
            "whole on every rank: nothing",
        ]
        assert after == [
            *before[:4],
            f"buffers: {buffers / 1e6:.1f} MB on this rank after an image of {steps} steps",
            before[-1],
        ]
        assert steps == 4 and buffers > 0
        assert undone == ["no patches and no CFG parallelism: StableDiffusionPipeline runs whole, nothing is exchanged"]


def test_a_controlnet_is_shared_as_the_unet_is(found: dict[str, list[Any]]) -> None:
    for rank in found["controlled"]:
        assert rank["error"] <= 1e-4 and rank["restored"]
        assert rank["said"] == [
            "controlnet: 24 convolutions (halo rows), 27 group norms (moments), 7 self-attentions (keys and values)"
        ]
        alone, controlled = rank["kv"]
        assert 1.3 * alone < controlled < 1.5 * alone, "7 self-attentions beside 16"


def test_patches_may_have_unequal_shares(found: dict[str, list[Any]]) -> None:
    first, second = found["unequal"]
    for rank in (first, second):
        assert rank["error"] <= 1e-4 and "--patch_shares 1,2,3: 3 given, and there are 2 patches" in rank["told"]
    assert (first["rows"], second["rows"]) == ([8], [16])


def test_a_norm_and_its_convolution_wait_once(found: dict[str, list[Any]]) -> None:
    pairs = 2 * 22 + 1  # of residual blocks, and the output's
    for rank in found["paired"]:
        assert max(case.get("error", 0.0) for case in rank.values()) <= 1e-4, rank
        saved = {name: case["saved"] for name, case in rank.items()}
        # A pair's adapters read the rows that came with the moments too; a hook parts its pair.
        assert saved == {
            "plain": pairs,
            "LoRA": 2 * pairs,
            "LoRA of two": 3 * pairs,
            "hooks": pairs - 1,
        }
