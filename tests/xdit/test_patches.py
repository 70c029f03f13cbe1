"""The patch series for xfuser: it applies, and the patched, otherwise stock, `xdit` runs on two ranks."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

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


SERIES = sorted((REPOSITORY / "patches").glob("*.patch"))
MENDED = (
    "sd3.5-medium",
    "z-image",
    "flux, 7 text tokens",
    "flux, 49 tokens and 7",
    "qwen-image, 7 text tokens",
    "qwen-image, 49 tokens and 7",
    "qwen-image, prompts of 7 and 4 tokens",
    "qwen-image-edit-2511",
    "cosmos3, 27 tokens",
)
"""Cases that xDiT gets wrong with Ulysses, or cannot run, without the patches."""


def copy_of_xfuser(tree: Path) -> Path:
    spec = importlib.util.find_spec("xfuser")
    assert spec is not None and spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, tree / "xfuser", ignore=shutil.ignore_patterns("__pycache__"))
    return tree


def apply(patch: Path, tree: Path, *options: str) -> None:
    # git, because not every machine that has a clone of this repository has the patch command.
    subprocess.run(
        ["git", "apply", "--verbose", *options, patch], cwd=tree, check=True, env=outside_of_any_repository()
    )


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the patched copy of the installed xfuser."""
    tree = copy_of_xfuser(tmp_path_factory.mktemp("patched"))
    assert [patch.name[:4] for patch in SERIES] == [f"{number:04}" for number in range(1, 11)]
    for patch in SERIES:
        apply(patch, tree)
    return tree


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the installed xfuser."""
    return copy_of_xfuser(tmp_path_factory.mktemp("released"))


@pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.stem)
def test_each_applies_alone(patch: Path, released: Path) -> None:
    apply(patch, released, "--check")


def exactness(tree: Path, degrees: str, exchange: str) -> dict[str, dict[str, Any]]:
    """What `tests/workers/dit_exactness.py` says of each case with the xfuser of a folder, on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = REPOSITORY / "tests" / "workers" / "dit_exactness.py"
    done = subprocess.run(
        [*command, worker, "--degrees", degrees, "--exchange", exchange, "--cases", *MENDED],
        env={**environment(tree), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-4000:]
    return {line["case"]: line for line in lines}


def is_exact(line: dict[str, Any]) -> bool:
    return line["stopped"] is None and line["max_abs_error"] <= 5e-5


@pytest.mark.slow
def test_xdits_ulysses_is_exact_with_the_patches_and_without_this_package(patched: Path) -> None:
    found = exactness(patched, "1,2,1", "gather")  # which has nothing to gather
    assert [case for case in MENDED if not is_exact(found[case])] == [], found


@pytest.mark.slow
def test_without_the_patches_it_is_not(released: Path) -> None:
    found = exactness(released, "1,2,1", "gather")
    assert [case for case in MENDED if is_exact(found[case])] == [], found


@pytest.mark.slow
def test_the_plugin_is_exact_with_a_patched_xfuser(patched: Path) -> None:
    found = exactness(patched, "2,1,1", "plugin")
    assert [case for case in MENDED if not is_exact(found[case])] == [], found


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
