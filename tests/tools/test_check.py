"""`otil-xdit check`: a whole check on two CPU ranks, a part that fails, what is refused before ranks start."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from otil_xdit.tools import main as tools
from otil_xdit.tools.check import advice, cli, exactness, kernels, kill
from otil_xdit.tools.check.profile import busy_and_span, count_innermost
from otil_xdit.tools.check.random_pipes import flux_subject, memory_needed, sdxl_subject
from otil_xdit.tools.check.runner import Check, Finding, Part
from otil_xdit.tools.check.settings import LEAST_STEPS, Settings
from tests.support.dits.packed import build_flux
from tests.support.rank_tasks import raise_on_rank_1
from tests.support.unets import build_unet

SMALL = ["--models", "tiny-sd", "--images", "1", "--rounds", "1", "--steps", str(LEAST_STEPS)]

REFUSED = {
    "part": (["--parts", "card"], "argument --parts: invalid choice: 'card'"),
    "ranks": (["--ranks", "1"], "--ranks 1"),
    "model": (["--models", "SDXXL"], "--models SDXXL: no such model; choose from tiny-sd, "),
    "images": (["--images", "0"], "--images 0"),
    "steps": (["--steps", "4"], "--steps 4"),
    "timeout": (["--timeout", "nan"], "--timeout nan: give 5 seconds or more"),
    "out": (["--out", __file__], "is a file; give a folder"),
}


def broken(check: Check) -> Finding:
    """A part whose rank fails."""
    check.ask(raise_on_rank_1)
    return Finding("not reached", {})


@pytest.mark.slow
def test_a_part_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "PARTS", (Part("broken", 50, "fails", broken), *cli.PARTS))
    monkeypatch.setattr(cli, "_NAMES", [part.name for part in cli.PARTS])
    assert tools.main(["check", *SMALL, "--out", str(tmp_path)]) == 1
    data = json.loads((tmp_path / "check.json").read_text())
    parts = {part["part"]: part for part in data["parts"]}
    assert list(parts) == ["broken", "cards", "links", "exactness", "kernels", "repeats", "speed", "kill", "advice"]
    states = {name: part["state"] for name, part in parts.items()}
    assert states.pop("broken") == "failed" and states.pop("kernels") == "skipped"
    assert set(states.values()) == {"ok"}, parts
    assert parts["broken"]["wrong"] == ["rank 1: ArithmeticError: as told"] and not data["ok"]
    check_data(parts)
    page = (tmp_path / "check.md").read_text()
    assert "| broken | failed |" in page and "- **rank 1: ArithmeticError: as told**" in page
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[:-1]] == list(parts)


def check_data(parts: dict[str, Any]) -> None:
    """What machines read of a check on two CPU ranks."""
    for part in parts.values():
        assert set(part) == {"part", "state", "seconds", "budget_seconds", "said", "wrong", "data"}
        assert part["said"] and part["seconds"] < part["budget_seconds"]
    data = {name: part["data"] for name, part in parts.items()}
    assert [one["rank"] for one in data["cards"]["ranks"]] == [0, 1]
    links = data["links"]
    assert links["backend"] == "gloo" and links["p2p"] is None and links["rate"] > 1e6
    assert all(row["gather_seconds"] > 0 and row["neighbours_seconds"] > 0 for row in links["sizes"])
    assert [row["model"] for row in data["exactness"]["models"]] == ["tiny-sd", "tiny-sdxl", "tiny-dit"]
    assert all(0 < row["float32"] < 1e-4 and row["bfloat16"] is None for row in data["exactness"]["models"])
    assert data["repeats"] == {"model": "tiny-sd", "images": 1, "asked": 1, "different": []}
    (model,) = data["speed"]["models"]
    assert list(model["strategies"]) == ["one process", "sync", "distrifusion", "otil"]
    launches = [one["launches"] for one in model["strategies"].values()]
    assert 1000 < launches[0] < launches[1] and all(one["ms"] > 0 for one in model["strategies"].values())
    assert data["kill"]["left"] == 0 and "rank 1 says nothing" in data["kill"]["errors"][0]
    (row,) = data["advice"]["models"]
    assert row["measured"] in model["strategies"] and row["planned"]["command"].startswith("xfuser --model tiny-sd ")


def test_the_exit_code_is_0_where_nothing_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (
        Part("good", 1, "finds something", lambda check: Finding("found", {"settings": check.settings.ranks})),
        Part("next", 1, "reads it", lambda check: Finding(str(check.found["good"]), {})),
    )
    monkeypatch.setattr(cli, "PARTS", parts)
    monkeypatch.setattr(cli, "_NAMES", ["good", "next"])
    assert tools.main(["check", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "check.json").read_text())
    assert data["ok"] and data["parts"][1]["said"] == "{'settings': 2}"


def test_a_mistake_in_a_part_is_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (Part("good", 1, "", lambda check: Finding("", {"is": {}["missing"]})),)
    monkeypatch.setattr(cli, "PARTS", parts)
    monkeypatch.setattr(cli, "_NAMES", ["good"])
    assert tools.main(["check", "--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "check.json").read_text())["parts"][0]["wrong"] == ["KeyError: 'missing'"]


@pytest.mark.parametrize("wrong", REFUSED)
def test_wrong_flags_are_refused_in_one_line_before_ranks_start(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "jobs_of_a_run", lambda *arguments: pytest.fail("ranks were started"))
    flags, said = REFUSED[wrong]
    with pytest.raises(SystemExit) as ended:
        tools.main(["check", "--out", str(tmp_path / "out"), *flags])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def settings_of(cards: int, ranks: int | None = None) -> Settings:
    return Settings.of(cards, ranks=ranks, models=None, images=None, steps=8, rounds=3, timeout=20.0)


def test_settings_follow_the_cards() -> None:
    assert (settings_of(0).ranks, settings_of(0).images, settings_of(0).models) == (2, 3, ("tiny-sd", "tiny-dit"))
    one, four = settings_of(1), settings_of(4)
    assert (one.ranks, one.shares_card, one.images) == (2, True, 100)
    assert (four.ranks, four.shares_card, four.models) == (4, False, ("SDXL", "FLUX"))
    with pytest.raises(ValueError, match="--ranks 3: this machine has 1 card; give 2"):
        settings_of(1, 3)
    with pytest.raises(ValueError, match="--ranks 5: this machine has 4 cards; give 2 to 4"):
        settings_of(4, 5)


def test_the_parts_take_8_minutes_together() -> None:
    assert sum(part.seconds for part in cli.PARTS) <= 480


def test_an_error_is_judged_by_one_process_in_the_same_precision() -> None:
    good = {"model": "m", "float32": 9e-5, "bfloat16": 0.019, "bfloat16_alone": 0.01}
    assert exactness.judge(good) == "" and exactness.judge({**good, "bfloat16": None}) == ""
    assert "float32 is off by 2.0e-04" in exactness.judge({**good, "float32": 2e-4})
    assert "float32 is off by nan" in exactness.judge({**good, "float32": float("nan")})
    assert "bfloat16 is off by 3.0e-02, one process by 1.0e-02" in exactness.judge({**good, "bfloat16": 0.03})


def test_a_killed_rank_is_to_be_named_in_time() -> None:
    seen = {"error": "ExchangeTimeout: rank 0 of 3: no answer (reset); rank 2 says nothing", "time": 105.0}
    assert kill.judge(0, seen, 2, 100.0, 20.0) == ""
    assert kill.judge(0, None, 2, 100.0, 20.0) == "rank 0 said nothing"
    assert "does not name rank 1" in kill.judge(0, seen, 1, 100.0, 20.0)
    assert kill.judge(0, seen, 2, 80.0, 20.0) == "rank 0 needed 25 s, more than 20"


def test_gaps_are_what_no_kernel_covers() -> None:
    assert busy_and_span([(30, 40), (0, 10), (5, 20), (32, 35)]) == (30, 40)
    assert busy_and_span([]) == (0, 0)
    assert count_innermost([(0, 10), (1, 4), (5, 9), (6, 8), (12, 13)]) == 3  # (1, 4), (6, 8), (12, 13)


def test_equal_times_are_decided_by_the_image() -> None:
    ms = {"one process": 100.0, "sync": 60.5, "distrifusion": 60.0, "otil": 60.1}
    assert advice.fastest(ms) == "sync"
    assert advice.fastest({**ms, "sync": 70.0}) == "otil"
    assert advice.fastest({**ms, "one process": 61.0}) == "one process"
    assert advice.flags_of("otil", 3) == ["--parallel", "otil", "--patch_degree", "3"]


@pytest.fixture
def kernels_and_user(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A module that has asked for the switch of kernels by name."""
    name = kernels.KERNELS
    found = sys.modules.get(name) or SimpleNamespace(is_fused=lambda tensor: True)
    monkeypatch.setitem(sys.modules, name, found)
    user = SimpleNamespace(is_fused=found.is_fused)
    monkeypatch.setitem(sys.modules, "a_user_of_kernels", user)
    yield user


def test_kernels_are_switched_off_where_they_are_used(kernels_and_user: SimpleNamespace) -> None:
    switch = kernels_and_user.is_fused
    with kernels.eager():
        assert kernels_and_user.is_fused is not switch and not kernels_and_user.is_fused(torch.zeros(1))
    assert kernels_and_user.is_fused is switch
    assert kernels.why_absent(0) == "kernels run on CUDA cards, and there is none"


@torch.no_grad()
def test_a_pipeline_round_random_weights_makes_an_image() -> None:
    """The published networks' own pipelines, round small ones here."""
    for subject in (sdxl_subject(build_unet("sdxl"), 7, 128), flux_subject(build_flux().transformer, 8, 128)):
        subject.pipe.set_progress_bar_config(disable=True)
        latents = subject.pipe(**subject.call, num_inference_steps=2).images
        assert latents.shape[0] == 1 and torch.isfinite(latents).all()
    assert 5e9 < memory_needed("SDXL", torch.bfloat16) - 4e9 < 8e9  # 2.57e9 weights of 2 bytes
