"""`python -m otil_xdit.run`: unchanged scripts of diffusers and xDiT on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from otil_xdit.xdit.launcher import script
from otil_xdit.xdit.launcher.script import main

SCRIPTS = Path(__file__).resolve().parents[1] / "workers" / "scripts"
PATIENCE = 240


def lines_of_script(name: str, *arguments: str, options: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "otil_xdit.run", *options, str(SCRIPTS / name), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("arguments", "processes"),
    [
        (["SCRIPT"], 1),
        (["--parallel", "otil", "--patch_degree", "3", "SCRIPT"], 3),
        (["--parallel", "sync", "--patch_degree", "2", "--use_cfg_parallel", "SCRIPT"], 4),
        (["--parallel", "hybridiff", "--patch_degree", "2", "SCRIPT"], 4),
        (["SCRIPT", "--model", "x", "--parallel", "sync", "--patch-degree", "2", "--ulysses_degree=2"], 4),
        (["SCRIPT", "--ring_degree", "2"], 2),
        (["--nproc_per_node", "5", "SCRIPT", "--ring_degree", "nonsense"], 5),
        (["SCRIPT", "--ring_degree", "nonsense"], 1),
    ],
)
def test_as_many_processes_as_the_degrees_say(
    arguments: list[str], processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(script, "_start_ranks", lambda number, arguments: started.append(number) or 0)
    monkeypatch.setattr(script, "_run", lambda *arguments: started.append(1))
    assert main([__file__ if argument == "SCRIPT" else argument for argument in arguments]) == 0
    assert started == [processes]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-file.py"], "no-such-file.py: no such file"),
        (["--parallel", "foo", __file__], "--parallel foo: no such strategy; choose from otil"),
        (["--parallel", "sync", "--patch_degree", "3", "--nproc_per_node", "2", __file__], "does not fit 2 processes"),
        (["--nproc_per_node", "0", __file__], "--nproc_per_node 0: give a whole number from 1 up"),
        (["--otil_ratio", "0.5", __file__], "--otil_ratio given without --parallel"),
        ([], "the following arguments are required: script"),
    ],
)
def test_a_wrong_option_costs_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("otil_xdit.run: error: ") and said in lines[0]


@pytest.mark.slow
def test_an_unchanged_script_of_diffusers() -> None:
    (alone,) = lines_of_script("of_diffusers.py")
    ranks = lines_of_script("of_diffusers.py", options=("--parallel", "sync", "--patch_degree", "2"))
    assert sorted(line["rank"] for line in ranks) == [0, 1]
    for line in ranks:
        assert line["images"].keys() == alone["images"].keys()
        for name, pixels in line["images"].items():
            difference = max(abs(one - other) for one, other in zip(pixels, alone["images"][name], strict=True))
            assert difference <= 1, f"{name} on rank {line['rank']}"
            assert line["sent"][name] > 0, f"{name} was made by each rank alone"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["flux", "flux, 7 text tokens", "cogvideox"])
def test_a_script_that_shares_tokens_out_as_xdits_do(case: str) -> None:
    flags = (
        "--model",
        "x",
        "--case",
        case,
        "--parallel",
        "sync",
        "--patch_degree",
        "2",
        "--height",
        "128",
        "--width",
        "128",
    )
    (line,) = lines_of_script("of_xdit.py", *flags)
    assert line["errors"] and max(line["errors"]) <= 5e-5
    (line,) = lines_of_script("of_xdit.py", *flags[:5], "naive", "--otil_warmup_steps", "1", *flags[6:])
    assert min(line["errors"]) > 0.05, "the comparison cannot fail"
