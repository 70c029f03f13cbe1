"""`xfuser` with a fault: of a rank, of the launcher, of torchrun, of the disk, of the model's folder.

As a module that `xfuser` starts in place of `otil_xdit.xdit.launcher.runner` it is a rank with a fault.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from otil_xdit.catalog.bundled import model_folder  # noqa: E402
from otil_xdit.runtime.network_hooks import NetworkHooks  # noqa: E402
from tests.workers.faulty_ranks import (  # noqa: E402
    PROMPT,
    STEPS,
    TIMEOUT,
    Case,
    Outcome,
    arm,
    happened,
)

ENVIRONMENT = "OTIL_XDIT_TEST_FAULT"

SIGNALS = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM}
KILLED = {"launcher": ("launcher",), "torchrun": ("torchrun",), "launcher and torchrun": ("launcher", "torchrun")}
DISKS = ("full", "read-only")
UNTIL_ENDED = 400.0
"""Seconds that a run may take, on a machine with others."""

PAUSED = 3.0
"""Seconds that the store's keeper is stopped: less than `TIMEOUT`, which is what healthy ranks wait for."""

UNTIL_LEFT = 30.0
"""Seconds after which processes count as left behind."""


@dataclass(frozen=True)
class Expected:
    """What `xfuser` is to do.

    Attributes:
        code: its exit code; None for any but 0.
        says: what it writes, somewhere.
        image: whether there is an image at the end, in the asked folder or in the current one.
        starts: whether ranks are started.
    """

    code: int | None
    says: str
    image: bool = False
    starts: bool = True


LAUNCHED: dict[str, tuple[Case, Expected]] = {
    "SIGKILL of rank 1": (Case("kill", "tiny-sd", 2, {}, 1, 3, 0.4), Expected(None, "rank 1 says nothing")),
    "SIGKILL of rank 0": (Case("kill", "tiny-dit", 2, {}, 0, 2, 0.7), Expected(None, "rank 0 says nothing")),
    "SIGSTOP of a rank": (Case("stop", "tiny-sd", 2, {}, 1, 4, 0.2), Expected(None, "rank 1 says nothing")),
    "exception in a layer": (Case("layer", "tiny-dit", 2, {}, 1, 3, 0.5), Expected(None, "a fault in a layer")),
    "exception in a layer, CFG": (
        Case("layer", "tiny-sd", 4, {"use_cfg_parallel": True}, 2, 5, 0.8),
        Expected(None, "a fault in a layer"),
    ),
    "NaN": (Case("nan", "tiny-sd", 2, {}, 0, 3, 0.3), Expected(None, "NaN or Inf among")),
    "another ratio on a rank": (Case("ratio", "tiny-sd", 2, {}, 1, 0, 0.0), Expected(None, "otil_ratio is 0.875 on")),
    "another seed on a rank": (Case("seed", "tiny-dit", 2, {}, 1, 0, 0.0), Expected(None, "generator is seed 3")),
    "Ctrl-C to xfuser": (Case("interrupt", "tiny-sd", 2, {}, -1, 0, 0.0), Expected(130, "SIGINT, all processes")),
    "SIGTERM to xfuser": (Case("terminate", "tiny-dit", 2, {}, -1, 0, 0.0), Expected(143, "SIGTERM, all processes")),
    "SIGKILL of xfuser": (Case("launcher", "tiny-sd", 2, {}, -1, 0, 0.0), Expected(-9, "")),
    "SIGKILL of torchrun, which keeps the store": (
        Case("torchrun", "tiny-sd", 2, {}, -1, 0, 0.0),
        Expected(137, "torchrun was ended by SIGKILL, all processes stopped"),
    ),
    "torchrun, which keeps the store, is stopped for 3 s": (
        Case("pause", "tiny-sd", 2, {}, -1, 0, 0.0),
        Expected(0, "", image=True),
    ),
    "SIGKILL of both": (Case("launcher and torchrun", "tiny-sd", 2, {}, -1, 0, 0.0), Expected(-9, "")),
    "the disk is full at the end": (
        Case("full", "tiny-sd", 2, {}, -1, 0, 0.0),
        Expected(0, "No space left on device; saved in", image=True),
    ),
    "the folder is read-only at the end": (
        Case("read-only", "tiny-sd", 2, {}, -1, 0, 0.0),
        Expected(0, "Read-only file system; saved in", image=True),
    ),
    "the folder is read-only before": (
        Case("read-only before", "tiny-sd", 2, {}, -1, 0, 0.0),
        Expected(2, "images cannot be saved there (Read-only file system)", starts=False),
    ),
    "the disk is full before": (
        Case("full before", "tiny-sd", 2, {}, -1, 0, 0.0),
        Expected(2, "images cannot be saved there (No space left on device)", starts=False),
    ),
    "a model's folder with a space": (
        Case("space", "tiny-sd", 2, {}, -1, 0, 0.0),
        Expected(0, "", image=True),
    ),
    "a model's folder by a symbolic link": (
        Case("link", "tiny-sd", 2, {}, -1, 0, 0.0),
        Expected(0, "", image=True),
    ),
    "weights by symbolic links, as the hub's cache has them": (
        Case("links", "tiny-sd", 2, {}, -1, 0, 0.0),
        Expected(0, "", image=True),
    ),
    "a missing shard": (
        Case("shard", "tiny-sd", 2, {}, -1, 0, 0.0),
        Expected(2, "unet/diffusion_pytorch_model-00002-of-00002.safetensors is missing", starts=False),
    ),
    "a truncated file": (
        Case("cut", "tiny-sd", 2, {}, -1, 0, 0.0),
        Expected(2, "unet/diffusion_pytorch_model.safetensors is cut off", starts=False),
    ),
    "a link to nowhere": (
        Case("dangling", "tiny-sd", 2, {}, -1, 0, 0.0),
        Expected(2, "unet/diffusion_pytorch_model.safetensors is missing", starts=False),
    ),
}
"""By what it is called in the table."""


# ---- a rank ----------------------------------------------------------------------------------------------------------


def launched_rank() -> int:
    """What a rank of the launcher runs in place of `otil_xdit.xdit.launcher.runner`."""
    told = json.loads(os.environ[ENVIRONMENT])
    case, folder, rank = Case(**told["case"]), Path(told["folder"]), int(os.environ["RANK"])
    (folder / f"pid-{os.getpid()}").touch()
    if rank == case.victim and case.kind in ("ratio", "seed"):
        sys.argv += {"ratio": ["--otil_ratio", "1/2"], "seed": ["--seed", "7"]}[case.kind]
    if case.victim < 0:
        prepare = NetworkHooks.prepare

        def noted(hooks: NetworkHooks, networks: Mapping[str, nn.Module], pipes: Iterable[Any]) -> None:
            prepare(hooks, networks, pipes)
            (folder / "happened").write_text(repr(time.time()))

        NetworkHooks.prepare = noted  # type: ignore[method-assign]  # to know when it began
    else:
        arm(case, rank, folder, 0)
    from otil_xdit.xdit.launcher import runner

    return runner.main()


# ---- folders ---------------------------------------------------------------------------------------------------------


def made_model(kind: str, folder: Path) -> str:
    """What to give as ``--model``."""
    if kind not in ("space", "link", "links", "shard", "cut", "dangling"):
        return "tiny-sd"
    made = folder / "a model of mine"
    shutil.copytree(model_folder("tiny-sd"), made)
    weights = made / "unet" / "diffusion_pytorch_model.safetensors"
    if kind == "link":
        (folder / "link").symlink_to(made, target_is_directory=True)
        return str(folder / "link")
    if kind in ("links", "dangling"):
        stored = folder / "0f3a"
        shutil.move(weights, stored)
        weights.symlink_to(stored)
        if kind == "dangling":
            stored.unlink()
    if kind == "cut":
        os.truncate(weights, 1_000_000)
    if kind == "shard":
        names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        weights.rename(weights.with_name(names[0]))
        index = {"metadata": {}, "weight_map": {"conv_in.weight": names[0], "conv_out.weight": names[1]}}
        weights.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return str(made)


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A disk of 256 KiB of one's own; it takes root."""
    place = folder / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True, capture_output=True)


def spoil(kind: str, place: Path) -> None:
    """Fill a disk, or forbid writing to it."""
    if kind.startswith("full"):
        with contextlib.suppress(OSError), (place / "filling").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    else:
        subprocess.run(["mount", "-o", "remount,ro", place], check=True, capture_output=True)


# ---- a case ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def launched(case: Case, folder: Path, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    model = made_model(case.kind, folder) if case.victim < 0 and case.model == "tiny-sd" else case.model
    steps = {**dict.fromkeys((*SIGNALS, *KILLED), 400), **dict.fromkeys(DISKS, 40)}.get(case.kind, STEPS)
    flags = ["--model", model, "--parallel", "otil", "--prompt", PROMPT, "--otil_timeout", str(TIMEOUT)]
    flags += ["--num_inference_steps", str(steps), "--output_directory", str(output), "--height", "128"]
    flags += ["--width", "128", "--seed", "3", "--patch_degree", "2"]
    flags += ["--use_cfg_parallel"] if case.degrees else []
    launch = "import sys; from otil_xdit.xdit.launcher import main as launcher; launcher.RUNNER = {!r}; "
    start = launch.format("tests.workers.launched_faults") + f"sys.exit(launcher.main({flags!r}))"
    fault = json.dumps({"case": asdict(case), "folder": str(folder)})
    environment = {**os.environ, ENVIRONMENT: fault, "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-c", start]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def run_launched(case: Case) -> Outcome:
    """The case through `xfuser`; `seconds` are from the fault to the end of the last process."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        output = folder
        if case.kind.removesuffix(" before") in DISKS:
            output = stack.enter_context(disk(folder))
            if case.kind.endswith(" before"):
                spoil(case.kind, output)
        started = time.time()
        process = stack.enter_context(launched(case, folder, output))
        deed = _deed(case, process, folder, output)
        while deed is not None and process.poll() is None:
            time.sleep(0.05)
            since = time.time() - _moment(folder, time.time())
            if since > {"stop": 2 * TIMEOUT, **dict.fromkeys((*DISKS, "pause"), 0.0)}.get(case.kind, 1.0) and happened(
                folder
            ):
                deed()
                if case.kind != "stop":
                    (folder / "happened").write_text(repr(time.time()))
                break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(UNTIL_ENDED)
        left = _left(process, folder)
        over = time.time() + UNTIL_LEFT
        while left and time.time() < over:
            time.sleep(0.05)
            left = _left(process, folder)
        ended, text = time.time(), (folder / "log").read_text()
        ranks = len([*folder.glob("pid-*")])
        codes: dict[int, int | None] = {-1: process.returncode, **dict.fromkeys(-found.pid for found in left)}
        for found in left:
            found.kill()
        seen = {0: {"ranks": ranks, "images": len([*folder.glob("*.png"), *output.glob("*.png")])}}
        seconds = ended - _moment(folder, started if ranks == 0 else float("nan"))
        return Outcome(case, seen, codes, "xfuser", text, seconds)


def judged(outcome: Outcome, expected: Expected) -> str:
    """What is wrong with an outcome; empty where nothing is."""
    code, seen = outcome.codes[-1], outcome.seen[0]
    faults = [f"{outcome.left} processes left"] if outcome.left else []
    faults += [] if (code != 0 if expected.code is None else code == expected.code) else [f"exit code {code}"]
    faults += [] if expected.says in outcome.text else [f"does not say {expected.says!r}"]
    faults += [] if (seen["images"] > 0) == expected.image else [f"{seen['images']} images"]
    faults += [] if (seen["ranks"] > 0) == expected.starts else [f"{seen['ranks']} ranks started"]
    faults += ["a traceback"] if "Traceback" in outcome.text else []
    return "; ".join(faults)


def _deed(case: Case, process: subprocess.Popen[bytes], folder: Path, output: Path) -> Callable[[], object] | None:
    """What is done to a run from outside, once it has begun its steps."""
    if case.kind in SIGNALS:
        return lambda: process.send_signal(SIGNALS[case.kind])
    if case.kind in KILLED:
        return lambda: _kill(process, KILLED[case.kind])
    if case.kind in DISKS:
        return lambda: spoil(case.kind, output)
    if case.kind == "pause":
        return lambda: _pause(process)
    return (lambda: _resume(folder)) if case.kind == "stop" else None


def _kill(launcher: subprocess.Popen[bytes], which: tuple[str, ...]) -> None:
    (torchrun,) = psutil.Process(launcher.pid).children()
    for name in which:
        os.kill(launcher.pid if name == "launcher" else torchrun.pid, signal.SIGKILL)


def _pause(launcher: subprocess.Popen[bytes]) -> None:
    (torchrun,) = psutil.Process(launcher.pid).children()
    torchrun.suspend()
    time.sleep(PAUSED)
    torchrun.resume()


def _resume(folder: Path) -> None:
    for path in folder.glob("pid-*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.name[4:]), signal.SIGCONT)


def _moment(folder: Path, otherwise: float) -> float:
    """When the fault happened."""
    text = (folder / "happened").read_text() if happened(folder) else ""
    return float(text) if text else otherwise


def _left(process: subprocess.Popen[bytes], folder: Path) -> list[psutil.Process]:
    """Processes that were started, by whomever, for the case in that folder: torchrun and its ranks."""
    return [found for found in psutil.process_iter() if found.pid != process.pid and _belongs_to(found, folder)]


def _belongs_to(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return str(folder) in process.environ().get(ENVIRONMENT, "") and process.status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    sys.exit(launched_rank())
