"""The launcher: what it starts, what it refuses, and that it leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from otil_xdit.errors import FlagError
from otil_xdit.xdit.launcher import main as cli
from otil_xdit.xdit.launcher.processes import CPU_ENVIRONMENT, run_to_end
from otil_xdit.xdit.launcher.quiet import QUIET_ENVIRONMENT

PATIENCE = 240.0  # seconds; importing xfuser takes 5 on an idle machine and a minute on a crowded one
MODEL = ["--model", "tiny-dit", "--prompt", "a red circle"]

WRONG = {
    "strategy": (
        "--parallel foo",
        "no such strategy; choose from otil, otil-paper, distrifusion, compact-1bit, compact-2bit, hybridiff, sync, "
        "naive",
    ),
    "output folder": ("--parallel otil --output_directory /nowhere", "--output_directory /nowhere: no such directory"),
    "ratio 0": ("--parallel otil --otil_ratio 0", "give a number in (0, 1]"),
    "ratio 1.5": ("--parallel otil --otil-ratio=1.5", "give a number in (0, 1]"),
    "ratio abc": ("--parallel otil --otil_ratio abc", "give a fraction such as 1/8"),
    "block 0": ("--parallel otil --otil_block_size 0", "--otil_block_size is 0; give a whole number from 1"),
    "block of more than a patch": (
        "--parallel otil --otil_block_size 32",
        "--otil_block_size 32 is larger than a patch",
    ),
    "patches and world": (
        "--parallel otil --patch_degree 3 --nproc_per_node 4",
        "--patch_degree 3 does not fit 4 processes",
    ),
    "world": ("--parallel otil --ulysses_degree 3 --nproc-per-node=4", "4 processes cannot be shared out"),
    "height": ("--parallel otil --height 100", "--height 100 cannot be cut into 2 patches"),
    "pipefusion": (
        "--parallel otil --pipefusion_parallel_degree 2",
        "--parallel otil and --pipefusion_parallel_degree 2 are not supported together",
    ),
    "model": ("--parallel otil --model tny-dit", "--model tny-dit: no such model; did you mean tiny-dit"),
    "folder": (
        "--parallel otil --model ./tiny-dit",
        "--model ./tiny-dit: no such model or folder; did you mean tiny-dit",
    ),
    "model of one device": ("--parallel otil --model CausalWan", "CausalWan is not supported together with --parallel"),
    "model without ring": ("--parallel otil --model MiniMax-H3", "--model MiniMax-H3 is not supported together"),
    "prompts": (
        "--parallel otil --model tiny-sd --data_parallel_degree 2",
        "--data_parallel_degree 2 needs as many prompts, and 1 given",
    ),
    "unknown scheduler": ("--scheduler foo", "'foo' is not a scheduler; choose from ddim, ddpm, deis, dpm-solver"),
    "scheduler of a DiT": ("--scheduler ddim", "--scheduler ddim is for U-Nets; --model tiny-dit is none"),
    "no --parallel": ("--otil_ratio 1/8", "--otil_ratio given without --parallel"),
    "no such flag": ("--otil_ration 1/8", "unrecognized arguments: --otil_ration"),
    "no value": ("--parallel otil --nproc_per_node", "--nproc_per_node needs a value"),
    "no value after =": ("--parallel otil --otil_ratio=--", "--otil_ratio=--: '--' is not a value"),
    "steps 0": ("--num_inference_steps 0", "--num_inference_steps is 0; give a whole number from 1 to 10000"),
    "height 0": ("--height 0", "--height is 0; give a whole number from 1 to 65536"),
    "seed of 20 digits": (f"--seed {'9' * 20}", f"--seed is {'9' * 20}; give a whole number"),
    "no text": ("--prompt", '--prompt has no text; give --prompt "..."'),
    "negative prompts": ("--prompt a b --negative_prompt c d e", "--negative_prompt has 3 texts and --prompt 2"),
    "dataset": ("--dataset_path /nowhere.csv", "--dataset_path /nowhere.csv: no such file"),
    "dataset without a batch": (f"--dataset_path {__file__}", "Please specify batch size for dataset inference"),
    "input image": ("--input_images /nowhere.png", "--input_images /nowhere.png: no such file"),
    "sharding": ("--fully_shard_degree 2", "--model tiny-dit is not supported together with --fully_shard_degree"),
    "float8": ("--use_fp8_gemms", "--model tiny-dit is not supported together with --use_fp8_gemms"),
    "attention": ("--attention_backend foo", "--attention_backend foo: no such backend; choose from sdpa, "),
    "vae": ("--parallel otil --vae half", "argument --vae: WHERE is 'half'; choose from patches, whole"),
    "xDiT's degrees": ("--vae_tile_size_height 64 --enable_tiling", "--vae_tile_size_width"),
    "abbreviation": ("--batch 2", "unrecognized arguments: --batch"),
    "abbreviation of torchrun's": ("--parallel otil --nproc 2", "unrecognized arguments: --nproc"),
    "output folder that cannot be written": ("--output_directory /proc", "images cannot be saved there"),
    "nodes": ("--parallel otil --nnodes x", "--nnodes is 'x'; give a whole number"),
    "nodes and world": (
        "--parallel otil --nnodes 2 --patch_degree 3 --height 192",
        "--nnodes 2 does not divide the 3 processes",
    ),
}


pytestmark = pytest.mark.usefixtures("cpu_machine")


@pytest.mark.parametrize(("line", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_one_line_before_anything_starts(
    line: str, message: str, no_start: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*MODEL, *line.split()]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("xfuser: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert message in err


def planned(line: str) -> dict[str, str]:
    """The flags that torchrun gets."""
    command = cli.plan([*MODEL, *line.split()], {}).command
    return dict(part[2:].split("=", 1) for part in command[3 : command.index("-m", 3)])


@pytest.mark.parametrize(
    ("line", "devices", "processes"),
    [
        ("--parallel otil", 0, "2"),
        ("--parallel otil", 4, "4"),
        ("--parallel otil --use_cfg_parallel", 0, "4"),
        ("--parallel otil --use_cfg_parallel", 4, "4"),
        ("--parallel otil --patch_degree 2", 8, "2"),
        ("--parallel otil --patch-degree=4", 0, "4"),
        ("--parallel otil --ring_degree 4", 0, "4"),
        ("--parallel otil --patch_degree 2 --ulysses-degree 2 --use-cfg-parallel", 0, "8"),
        ("--parallel otil --nproc_per_node 4", 0, "4"),
        ("--parallel otil --nproc-per-node=4 --ulysses_degree=2", 0, "4"),
        ("--parallel otil --nproc_per_node auto", 2, "2"),
        ("--parallel otil --patch_degree 4 --nnodes 2", 2, "2"),
        ("", 4, "1"),
        ("--ulysses_degree 2", 0, "2"),
        ("--ulysses_degree=2 --ring_degree 2 --use_cfg_parallel", 0, "8"),
        ("--ulysses_degree 2 --nproc_per_node 3", 0, "3"),
    ],
)
def test_number_of_processes(line: str, devices: int, processes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "visible_devices", lambda: devices)
    assert planned(line)["nproc_per_node"] == processes


def test_a_chosen_number_of_processes_is_said() -> None:
    assert cli.plan([*MODEL, "--parallel", "sync"], {}).note == (
        "no --patch_degree and no --nproc_per_node: 2 processes, 2 patches, as there is no accelerator"
    )
    assert cli.plan([*MODEL, "--parallel", "sync", "--patch_degree", "2"], {}).note is None


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "visible_devices", lambda: 2)
    with pytest.raises(FlagError, match="4 processes on this machine need as many devices, and 2 are visible"):
        cli.plan([*MODEL, "--parallel", "otil", "--patch_degree", "4"], {})


@pytest.mark.parametrize("line", ["", "--ulysses_degree 2 --ring-degree=2", "--nnodes 2 --node_rank 1 --master_port 1"])
def test_without_parallel_the_command_is_that_of_xdit(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = cli.plan([*MODEL, *line.split()], {}).command
    from xfuser import cli as xdit

    started: list[list[str]] = []

    class Recorded:
        def __init__(self, command: list[str], **options: object) -> None:
            started.append(command)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(xdit.subprocess, "Popen", Recorded)
    monkeypatch.setattr(xdit.signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit):
        xdit.main([*MODEL, *line.split()])
    (theirs,) = started
    renamed = {"xfuser.runner": cli.RUNNER, "torch.distributed.run": cli.AGENT}
    assert list(ours) == [renamed.get(part, part) for part in theirs]


def test_two_runs_on_one_machine_get_two_ports() -> None:
    ports = {planned("--parallel otil")["master_port"] for _ in range(2)}
    assert len(ports) == 2 and "29500" not in ports
    assert planned("--parallel otil --master-port 1234")["master_port"] == "1234"


def test_environment_of_cpu_ranks_can_be_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "has_accelerator", lambda: False)
    environment = cli.plan(MODEL, {"OMP_NUM_THREADS": "3"}).environment
    assert environment == {**CPU_ENVIRONMENT, "OMP_NUM_THREADS": "3"}
    monkeypatch.setattr(cli, "has_accelerator", lambda: True)
    assert cli.plan(MODEL, {"A": "b"}).environment == {"A": "b"}


@pytest.mark.parametrize(
    ("line", "is_quiet"),
    [("", False), ("--verbose", False), ("--parallel otil --verbose", False), ("--parallel otil", True)],
)
def test_only_parallel_runs_are_quiet(line: str, is_quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = cli.plan([*MODEL, *line.split()], {})
    assert (launch.environment.items() >= QUIET_ENVIRONMENT.items()) is is_quiet
    assert not set(QUIET_ENVIRONMENT) & set(launch.environment) or is_quiet
    assert "--verbose" not in launch.command
    assert cli.plan([*MODEL, *line.split()], {"LOG_LEVEL": "info"}).environment["LOG_LEVEL"] == "info"
    monkeypatch.setattr(cli, "has_accelerator", lambda: True)
    monkeypatch.setattr(cli, "visible_devices", lambda: 2)
    threads = cli.plan([*MODEL, *line.split()], {}).environment.get("OMP_NUM_THREADS")
    assert threads == ("1" if is_quiet else None)


def launched(folder: Path, *flags: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of two ranks that make a small image."""
    done = subprocess.run(
        [sys.executable, "-m", "otil_xdit", "--model", "tiny-sd", "--prompt", "a red circle", "--parallel", "otil"]
        + ["--patch_degree", "2", "--num_inference_steps", "3", "--output_directory", str(folder), *flags],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_run_says_what_runs_on_what_and_where_the_image_is(tmp_path: Path) -> None:
    code, out, err = launched(tmp_path)
    assert code == 0, err
    (image,) = tmp_path.glob("*.png")
    before, after = out.splitlines()
    assert before == "xfuser: tiny-sd, 128 x 128 pixels, 3 steps, strategy otil, 2 ranks (2 patches) on the CPU"
    assert re.fullmatch(rf"xfuser: {re.escape(str(image))}, \d+\.\d\d s, \d+\.\d\d MB sent by one rank", after)
    assert not after.endswith(" 0.00 MB sent by one rank")
    bar = err.replace("\r", "\n").split()
    assert "3/3" in bar and all(
        "it/s" in line or "s/it" in line for line in err.replace("\r", "\n").splitlines() if line
    )


@pytest.mark.slow
def test_a_verbose_run_says_it_all(tmp_path: Path) -> None:
    code, out, err = launched(tmp_path, "--verbose")
    assert code == 0, err
    (image,) = tmp_path.glob("*.png")
    assert len(out.splitlines()) > 50 and f"Output image saved to {image}" in out
    assert "kB of keys and values" in err


@pytest.mark.slow
def test_an_error_of_a_rank_is_seen(tmp_path: Path) -> None:
    code, _, err = launched(tmp_path, "--otil_report", str(tmp_path))  # rank 0 cannot write its report to a folder
    assert code == 1 and "IsADirectoryError" in err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for title in (
        "Otil options:",
        "Launch options:",
        "--num_inference_steps",
        "--patch_degree",
        "--nproc_per_node",
        "--verbose",
    ):
        assert title in text
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("otil-xdit 0.")


@pytest.mark.parametrize(
    ("code", "expected"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_exit_code_is_passed_on(code: str, expected: int) -> None:
    assert run_to_end([sys.executable, "-c", code], os.environ) == expected


STUBBORN = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(os.environ["PIDS"], str(os.getpid())).touch()
time.sleep(600)
"""
"""A rank that does not want to end, and says where it is."""


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.1)


def test_orphans_of_a_dying_command_are_ended(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    starts_and_dies = (
        "import subprocess, sys, time, os\n"
        f"subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True)\n"
        "while not os.listdir(os.environ['PIDS']): time.sleep(0.05)\n"
    )
    environment = {**os.environ, "PIDS": str(tmp_path / "pids")}
    assert run_to_end([sys.executable, "-c", starts_and_dies], environment) == 0
    (pid,) = (int(path.name) for path in (tmp_path / "pids").iterdir())
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_torchrun_and_all_ranks(number: signal.Signals, code: int, tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    (tmp_path / "stubborn_rank.py").write_text(STUBBORN)
    launch = "import sys; from otil_xdit.xdit.launcher import main as cli; cli.RUNNER = 'stubborn_rank'; "
    launch += f"sys.exit(cli.main({MODEL!r} + "
    launcher = subprocess.Popen(
        [sys.executable, "-c", launch + "['--parallel', 'otil', '--patch_degree', '2']))"],
        env={**os.environ, "PIDS": str(tmp_path / "pids"), "PYTHONPATH": os.pathsep.join([os.getcwd(), str(tmp_path)])},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: len(list((tmp_path / "pids").iterdir())) == 2)
        (torchrun,) = psutil.Process(launcher.pid).children()
        launcher.send_signal(number)
        _, err = launcher.communicate(timeout=PATIENCE)
    finally:
        launcher.kill()
    assert launcher.returncode == code
    assert err.splitlines()[-1] == f"xfuser: {number.name}, all processes stopped" and "Traceback" not in err
    ranks = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    assert not any(psutil.pid_exists(pid) for pid in (torchrun.pid, *ranks))


def test_a_prompt_is_needed(no_start: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--model", "tiny-dit"]) == 2
    assert capfd.readouterr().err == 'xfuser: error: --prompt is missing; give --prompt "..."\n'


@pytest.mark.parametrize(
    "line", ["--parallel nonsense", "--otil_ration 1/8", "--model tny-dit", "--prompt", "--patch_degree 2"]
)
def test_a_wrong_line_is_told_before_xfuser_and_diffusers_are_imported(line: str) -> None:
    code = (
        f"import sys; from otil_xdit.xdit.launcher import main as cli; code = cli.main({[*MODEL, *line.split()]!r}); "
    )
    code += "sys.exit(1 if {'xfuser', 'diffusers', 'transformers'} & set(sys.modules) else code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and done.stderr.startswith("xfuser: error: ") and done.stderr.count("\n") == 1
