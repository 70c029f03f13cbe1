"""`otil-xdit models`, the table behind it, and the version check."""

import importlib
import os
import signal
import sys

import pytest

from otil_xdit.catalog.models import MODELS
from otil_xdit.catalog.pipelines import WRAPPED_PIPELINES
from otil_xdit.tools import main as tools
from otil_xdit.xdit import versions
from otil_xdit.xdit.launcher.runner_registry import model_registry


def test_every_model_of_xfuser_is_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert tools.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1] for line in lines if line and not line.startswith(("exact", "untested"))}
    classes = {model for model in model_registry().values()}
    assert sum(row in model_registry() for row in rows) == len(classes)
    assert rows["tiny-dit"] == rows["SD3.5"] == rows["xFuserPixArtAlphaPipeline"] == "exact"
    assert rows["Lumina2"] == rows["Z-Image"] == rows["FLUX.1-Kontext-dev"] == "exact"
    assert rows["MiniMax-H3"] == rows["CausalWan"] == rows["xFuserSanaPipeline"] == "refused"
    assert rows["LTX-2.5"] == rows["LTX-2.3"] == rows["LTX-2"] == "exact"
    assert rows["SD1.5"] == rows["SDXL"] == rows["tiny-sdxl"] == "exact"
    assert rows["StableDiffusionXLInpaintPipeline"] == "yes" and rows["StableDiffusionSAGPipeline"] == "refused"


def test_a_reader_may_stop_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert tools.main(["models"]) == 128 + signal.SIGPIPE
        print("what Python flushes at its end goes nowhere")


def test_an_unknown_tool_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tools.main(["model"])
    assert ended.value.code == 2 and "models" in capsys.readouterr().err


def test_two_dashes_are_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    """argparse would make an empty list of them."""
    with pytest.raises(SystemExit) as ended:
        tools.main(["bench", "--limit=--"])
    assert ended.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("error: --limit=--: '--' is not a value; give --limit another one")
    )


def test_the_table_names_what_xfuser_has() -> None:
    known = {name.rsplit("/", 1)[-1].lower() for name in model_registry()}
    runners = [model for model in MODELS.values() if model.has_runner]
    assert {name for model in runners for name in model.short_names} <= known
    xfuser = importlib.import_module("xfuser.model_executor.pipelines")
    assert all(hasattr(xfuser, pipeline.name) for pipeline in WRAPPED_PIPELINES)


@pytest.mark.parametrize(("installed", "warned"), [("0.7.0", False), ("0.7.0+local", False), ("0.7.1", True)])
def test_an_untested_xfuser_is_warned_about(
    installed: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(versions, "version", lambda package: installed)
    versions.warn_if_untested()
    said = [record.getMessage() for record in caplog.records]
    assert said == (
        ["otil-xdit was tested with xfuser 0.7.0; its hooks may not fit 0.7.1, which is installed"] * warned
    )
