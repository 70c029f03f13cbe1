"""The patch series for xfuser: it applies, and the patched, otherwise stock, `xdit` runs on two ranks."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from otil_xdit.xdit.launcher.processes import free_port

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 300.0  # seconds
RUN = ["--model", "tiny-dit", "--prompt", "a red circle", "--num_inference_steps", "4"]

RANK_WITHOUT_PLUGIN = """
from otil_xdit.xdit.models.tiny_dit import register_models
register_models()
import xfuser.runner
from otil_xdit.xdit.launcher.runner import run_main_block
run_main_block(xfuser.runner)
"""
"""xfuser's runner with one more model, and with nothing of it replaced."""


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the patched copy of the installed xfuser."""
    tree = tmp_path_factory.mktemp("patched")
    spec = importlib.util.find_spec("xfuser")
    assert spec is not None and spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, tree / "xfuser", ignore=shutil.ignore_patterns("__pycache__"))
    series = sorted((REPOSITORY / "patches").glob("*.patch"))
    assert [patch.name[:4] for patch in series] == ["0001", "0002"]
    for patch in series:
        # git, because not every machine that has a clone of this repository has the patch command.
        subprocess.run(["git", "apply", "--verbose", patch], cwd=tree, check=True, env=outside_of_any_repository())
    return tree


def outside_of_any_repository() -> dict[str, str]:
    """git apply skips files silently when a repository above the folder does not hold them."""
    return {**os.environ, "GIT_CEILING_DIRECTORIES": "/", "GIT_DIR": os.devnull}


def environment(*paths: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, REPOSITORY)))}


def run(command: list[str], folder: Path, *paths: Path) -> None:
    done = subprocess.run(
        [*command, *RUN, "--output_directory", str(folder)],
        cwd=folder,
        env=environment(*paths),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.slow
def test_stock_xdit_runs_a_strategy(patched: Path, tmp_path: Path) -> None:
    info = patched / "otil_xdit-0.dist-info"  # as pip would write it, also where this package is not installed
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: otil-xdit\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[xfuser.parallel_strategies]\notil = otil_xdit.runtime.strategies:OTIL\n")
    report = tmp_path / "report.json"
    flags = ["--parallel", "otil", "--patch_degree", "2", "--otil_report", str(report)]
    run([sys.executable, "-m", "xfuser.cli", "--master_port", str(free_port()), *flags], tmp_path, patched)
    assert report.is_file()
    (stock,) = tmp_path.glob("*.png")
    ours = tmp_path / "ours"
    ours.mkdir()
    run([sys.executable, "-m", "otil_xdit", *flags], ours)
    assert stock.read_bytes() == (ours / stock.name).read_bytes()


def test_gloo_needs_no_plugin(patched: Path, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK_WITHOUT_PLUGIN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    run([*torchrun, "rank.py", "--ulysses_degree", "2"], tmp_path, patched)
    assert len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.slow
def test_the_patches_bring_a_test_that_passes(patched: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(patched)]
    subprocess.run([*command, "tests/core"], cwd=patched, env=environment(patched), check=True, timeout=PATIENCE)
