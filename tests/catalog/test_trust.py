"""A model's files run no code unless the user says so: booby-trapped pickles and Python files in a folder."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from otil_xdit.catalog.folders import load_pipe
from otil_xdit.catalog.trust import WITH_REMOTE_CODE, check_folder
from otil_xdit.errors import FlagError
from otil_xdit.tools import main as tools
from otil_xdit.tools.eval.cli import lora_file
from otil_xdit.xdit.launcher import main as cli
from otil_xdit.xdit.launcher.runner_registry import model_registry
from tests.support.tiny_folder import change_json, save_tiny_sd

ROOT = Path(__file__).parents[2]


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.write_text, (self.marker, "ran")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_sd(tmp_path / "my-sd")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def booby_trap(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(marker)))


def pickled(folder: Path, part: str, marker: Path) -> Path:
    """The part's weights as a pickle that is a trap, in place of its safetensors."""
    (found,) = (folder / part).glob("*.safetensors")
    found.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    booby_trap(folder / part / name, marker)
    return folder / part / name


def with_code(folder: Path, part: str, marker: Path, library: str = "evil") -> None:
    """A part whose class is in a Python file of the folder; importing that file springs the trap."""
    index = json.loads((folder / "model_index.json").read_text())
    kind = index[part][1]
    (folder / part / f"{library}.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\nfrom diffusers import {kind}\n"
    )
    change_json(folder / "model_index.json", **{part: [library, kind]})


def flags(folder: Path, *more: str) -> list[str]:
    job = ["--model", str(folder), "--prompt", "x", "--height", "48", "--width", "48", "--num_inference_steps", "1"]
    return [*job, "--parallel", "otil", "--patch_degree", "2", *more]


def test_the_traps_work(folder: Path, marker: Path) -> None:
    """Otherwise the tests below show nothing."""
    with pickled(folder, "unet", marker).open("rb") as file:
        pickle.load(file)
    assert marker.read_text() == "ran"
    marker.unlink()
    with_code(folder, "vae", marker)
    runpy.run_path(str(folder / "vae" / "evil.py"))
    assert marker.read_text() == "ran"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.usefixtures("cpu_machine", "no_start")
def test_a_pickle_in_place_of_safetensors_is_refused_before_anything_starts(
    part: str, folder: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pickled(folder, part, marker)
    assert cli.main(flags(folder)) == 2
    told = capsys.readouterr().err
    assert f"{part}/{file.name} is a pickle" in told and "--allow_pickle" in told and told.count("\n") == 1
    assert not marker.exists()


@pytest.mark.usefixtures("cpu_machine")
def test_a_pickle_is_let_through_when_asked_for_or_when_safetensors_are_there(folder: Path, marker: Path) -> None:
    booby_trap(folder / "unet" / "diffusion_pytorch_model.bin", marker)  # beside the safetensors: never read
    cli.plan(flags(folder), os.environ)
    pickled(folder, "vae", marker)
    cli.plan(flags(folder, "--allow_pickle"), os.environ)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (lambda folder, marker: with_code(folder, "unet", marker), "unet (evil)"),
        (lambda folder, marker: with_code(folder, "text_encoder", marker), "text_encoder (evil)"),
        (lambda folder, marker: with_code(folder, "vae", marker, "diffusers"), "vae/diffusers.py"),
        (
            lambda folder, marker: change_json(
                folder / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.M"}
            ),
            "text_encoder/config.json's auto_map",
        ),
        (
            lambda folder, marker: change_json(folder / "model_index.json", custom_pipeline="evil"),
            "model_index.json's pipeline",
        ),
    ],
    ids=["unet", "text encoder", "named like a library", "auto_map", "custom pipeline"],
)
@pytest.mark.usefixtures("cpu_machine", "no_start")
def test_code_of_a_folder_is_refused_before_anything_starts(
    changed: Any, told: str, folder: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(folder, marker)
    assert cli.main(flags(folder)) == 2
    error = capsys.readouterr().err
    assert told in error and "--trust-remote-code" in error and error.count("\n") == 1
    assert not marker.exists()


@pytest.mark.usefixtures("cpu_machine", "no_start")
def test_a_pipeline_class_of_its_own_is_no_text_to_image_pipeline(
    folder: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_json(folder / "model_index.json", _class_name=["evil", "StableDiffusionPipeline"])
    assert cli.main(flags(folder)) == 2
    assert "evil" in capsys.readouterr().err


def test_code_is_let_through_when_asked_for(folder: Path, marker: Path) -> None:
    with_code(folder, "vae", marker)
    check_folder(str(folder), trust_remote_code=True)
    with pytest.raises(FlagError, match="vae"):
        check_folder(str(folder))


@pytest.mark.usefixtures("no_start")
def test_models_of_xdit_that_run_remote_code_ask_for_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name, kind in model_registry().items() if kind.__module__.rpartition(".")[2] in WITH_REMOTE_CODE]
    assert len(names) > 1
    for name in names:
        assert cli.main(["--model", name, "--prompt", "x"]) == 2
        assert "--trust-remote-code" in capsys.readouterr().err


@pytest.mark.usefixtures("no_start")
def test_the_measuring_tools_load_no_pickles_and_no_code(
    folder: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled(folder, "unet", marker)
    with pytest.raises(FlagError, match="pickle"):
        load_pipe(str(folder), "own", None)
    booby_trap(tmp_path / "lora.bin", marker)
    with pytest.raises(FlagError, match="safetensors"):
        lora_file(tmp_path / "lora.bin")
    with pytest.raises(SystemExit):
        tools.main(["eval", "--models", str(folder), "--out", str(tmp_path / "out")])
    assert "pickle" in capsys.readouterr().err and not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("trap", ["pickle", "code"])
def test_the_ranks_refuse_by_themselves(trap: str, folder: Path, marker: Path) -> None:
    """Started by torchrun, without the launcher."""
    if trap == "pickle":
        pickled(folder, "unet", marker)
    else:
        with_code(folder, "unet", marker)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "otil_xdit.xdit.launcher.runner", *flags(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and ("--allow_pickle" if trap == "pickle" else "--trust-remote-code") in done.stderr
    assert not marker.exists()
