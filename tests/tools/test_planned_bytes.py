"""`otil-xdit plan`: bytes, messages and buffers are those that real ranks count, kind by kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from otil_xdit.dryrun.job import Job, ParallelDegrees
from otil_xdit.dryrun.networks import find_network, with_controlnets
from otil_xdit.dryrun.traffic import Traffic
from otil_xdit.tools.common.variants import parse_variant
from tests.support.torchrun import lines_of

STEPS = 10
"""More than `LEAST_FRESH_STEPS`, so that every way of exchanging a step occurs."""

MIXED = "otil:ratio=1/8,refresh=3,kv_cache_dtype=float8,select=latent-l2"
FEW = ("distrifusion", "otil")
BEFORE = "otil:coordinates=none,codec=2bit"


def case(
    model: str, strategy: str, size: tuple[int, int] = (128, 128), cfg: int = 1, ulysses: int = 1, controlnets: int = 0
) -> dict[str, Any]:
    height, width = size
    return {
        "model": model,
        "strategy": strategy,
        "height": height,
        "width": width,
        "cfg": cfg,
        "ulysses": ulysses,
        "steps": STEPS,
        "controlnets": controlnets,
    }


ON_RANKS: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "two": (
        2,
        [
            *(case("tiny-sd", strategy) for strategy in ("distrifusion", MIXED)),
            *(case(model, "otil") for model in ("tiny-sdxl", "tiny-dit")),
            case("tiny-sd", "otil"),
            case("tiny-dit", BEFORE),
            case("tiny-sd", "otil", controlnets=2),
            # 10 steps are too few for the window to begin before the last step at which it may.
            case("tiny-dit", "otil:window=auto"),
        ],
    ),
    "halves": (2, [case("tiny-dit", "hybridiff:window=4:6", cfg=2)]),
}
MORE: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "others on two": (
        2,
        [
            *(case("tiny-sd", strategy) for strategy in ("sync", BEFORE, "otil-paper", "naive")),
            *(case(model, "distrifusion") for model in ("tiny-sdxl", "tiny-dit")),
            case("tiny-dit", "otil:quality=draft"),
            case("tiny-sd", "otil:window=4:7"),
        ],
    ),
    # Patches of unequal height, one of them with two neighbours.
    "three": (3, [case("tiny-sd", strategy, (128, 96)) for strategy in FEW]),
    "halves of a U-Net": (2, [case("tiny-sd", "hybridiff:window=4:6", cfg=2)]),
    "ulysses": (2, [case("tiny-sd", "sync", ulysses=2)]),
    "cfg x patch": (
        4,
        [
            case(model, strategy, cfg=2)
            for strategy in ("otil", MIXED, BEFORE, "hybridiff:window=4:6", "hybridiff")
            for model in ("tiny-sd", "tiny-dit")
        ]
        # What passes agree on: with no step that does not wait, with none that does, and never.
        + [
            case("tiny-sd", f"otil:{settings}", cfg=2)
            for settings in ("quality=high", "window=3:7", "extrapolation=constant", "fresh_share=0")
        ]
        + [case("tiny-sd", strategy, cfg=2, controlnets=1) for strategy in ("otil", "hybridiff:window=4:6")],
    ),
    "halves of unequal patches": (6, [case("tiny-sd", "hybridiff:window=4:6", (128, 96), cfg=2)]),
    "ulysses in halves": (
        4,
        [case(model, "hybridiff:window=4:6", cfg=2, ulysses=2) for model in ("tiny-sd", "tiny-dit")],
    ),
    "ulysses x patch": (
        4,
        [case(model, strategy, ulysses=2) for strategy in ("otil", BEFORE) for model in ("tiny-sd", "tiny-dit")],
    ),
}


@pytest.mark.parametrize("name", list(ON_RANKS))
def test_bytes_messages_and_buffers_are_those_of_a_run(name: str, tmp_path: Path) -> None:
    compare(*ON_RANKS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MORE))
def test_so_they_are_with_cfg_and_ulysses(name: str, tmp_path: Path) -> None:
    compare(*MORE[name], tmp_path)


def compare(ranks: int, given: list[dict[str, Any]], folder: Path) -> None:
    """Run all of it on one torchrun, whose degrees cannot change, and plan all of it."""
    cases = folder / "cases.json"
    cases.write_text(json.dumps(given))
    lines = lines_of(ranks, "planned_bytes.py", str(cases))
    assert [line["case"] for line in lines] == given
    for line in lines:
        assert planned(line["case"], ranks) == [counted(report) for report in line["ranks"]], line["case"]


def counted(report: dict[str, Any]) -> dict[str, Any]:
    return {name: report[name] for name in ("sent_bytes", "messages", "buffer_bytes")}


def planned(case: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """The same of every rank, in xDiT's order: the passes of guidance outermost, Ulysses' ranks next to each other."""
    network = with_controlnets(find_network(case["model"]), case["controlnets"])
    job = Job(network, case["height"], case["width"], network.batch, torch.float32, network.text)
    rows = ranks // case["cfg"]
    degrees = ParallelDegrees(case["cfg"], case["ulysses"], rows // case["ulysses"])
    found = []
    for half in range(case["cfg"]):
        for place in range(rows):
            traffic = Traffic(job, degrees, place, half)
            run = traffic.of_run(parse_variant(case["strategy"]).config, case["steps"])
            found.append({"sent_bytes": run.sent_bytes, "messages": run.messages, "buffer_bytes": run.buffer_bytes})
    return found
