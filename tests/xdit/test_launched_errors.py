"""What is said when a rank fails under the launcher's torchrun: one line, with the exit code of that rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from otil_xdit.xdit.launcher.saving import save_somewhere

RANK = """
import os, signal, sys, time
from otil_xdit.errors import FlagError
from otil_xdit.xdit.launcher import runner
def fail():
{body}
runner.register = lambda: None
runner.importlib = type("importlib", (), {{"import_module": staticmethod(lambda name: fail())}})
os.environ["OTIL_XDIT_LAUNCH"] = os.environ["OTIL_XDIT_QUIET"] = "1"
sys.exit(runner.main())
"""

CASES = {
    "a flag": ("    raise FlagError('--x 1: give 2')", 2, "--x 1: give 2"),
    "xDiT's ValueError": ("    raise ValueError('no\\n such thing')", 1, "no such thing"),
    "an assertion": ("    assert False, 'degree'", 1, "AssertionError: degree"),
    "a missing file": ("    open('/nowhere')", 1, "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere'"),
    "one of them": (
        "    time.sleep(60) if os.environ['RANK'] == '0' else None\n    raise ValueError('rank 1 only')",
        1,
        "rank 1 only",
    ),
    "a signal": (
        "    time.sleep(60) if os.environ['RANK'] == '0' else os.kill(os.getpid(), signal.SIGKILL)",
        137,
        "rank 1 was ended by SIGKILL",
    ),
}


@pytest.mark.parametrize(("body", "code", "line"), CASES.values(), ids=CASES.keys())
def test_an_error_of_a_rank_is_one_line(body: str, code: int, line: str, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(body=body))
    done = subprocess.run(
        [sys.executable, "-m", "otil_xdit.xdit.launcher.agent", "--nproc_per_node=2", "--master_port=0"]
        + ["--standalone", str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, done.stderr
    assert done.stderr == f"xfuser: error: {line}\n"


class Runner:
    """Saves in folders that are there, as xDiT's runner does."""

    def __init__(self, folder: Path) -> None:
        self.config = SimpleNamespace(output_directory=str(folder))

    def save(self, output: Any = None) -> None:
        Path(self.config.output_directory, "image.png").write_bytes(output)


def test_an_image_that_cannot_be_saved_is_saved_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kind = type("Kind", (Runner,), {"save": Runner.save})
    save_somewhere(kind)
    kind(tmp_path / "gone").save(b"picture")
    assert (tmp_path / "image.png").read_bytes() == b"picture"
    said = f"--output_directory {tmp_path / 'gone'}: No such file or directory; saved in {tmp_path} instead"
    assert capsys.readouterr().err == f"xfuser: {said}\n"
