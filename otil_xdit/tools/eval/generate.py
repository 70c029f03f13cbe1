"""Makes the images that are missing: starts the torchruns, watches them, and says which case failed and why."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from otil_xdit.tools.common.processes import SIGNALLED, Interrupted, progress, rank_environment
from otil_xdit.tools.eval.cache import Store
from otil_xdit.tools.eval.matrix import Call, Case, Matrix
from otil_xdit.xdit.launcher.processes import STUCK, run_to_end

WORKER = "otil_xdit.tools.eval.worker"

WATCH_SECONDS = 0.5
"""How often the folder is looked at for new images."""

Failures = dict[Case, str]
"""What went wrong, one line for each case that could not be made."""


def make_images(matrix: Matrix, store: Store, jobs: int, timeout: float) -> Failures:
    """Make every image of the matrix that the store has not.

    Args:
        matrix: what to make.
        store: where it is kept.
        jobs: processes that references are shared out over.
        timeout: seconds in which a torchrun must finish an image.

    Returns:
        The cases that failed; every other one is in the store.

    Raises:
        Interrupted: after a signal.
    """
    failures = _make(matrix.references, matrix, store, jobs, timeout)
    for ranks in matrix.ranks:
        cases = []
        for case in matrix.cases(ranks):
            if case.reference in failures:
                failures[case] = f"no image of one process to compare with ({failures[case.reference]})"
            else:
                cases.append(case)
        # xDiT's groups of ranks are made once a process, for one number of patches.
        for patches in dict.fromkeys(case.patches for case in cases):
            alike = [case for case in cases if case.patches == patches]
            failures |= _make(alike, matrix, store, ranks, timeout)
    return failures


def _make(cases: Sequence[Case], matrix: Matrix, store: Store, processes: int, timeout: float) -> Failures:
    """Cases that run on the same number of processes. A torchrun that fails costs one case, and a new one goes on."""
    failures: Failures = {}
    while todo := [case for case in cases if case not in failures and store.missing(case)]:
        launch = _Launch(todo, matrix, store, processes)
        code = launch.run(timeout)
        if code in SIGNALLED:
            launch.clean_up()
            raise Interrupted(code)
        if any(store.missing(case) for case in todo):
            case, reason = launch.blame(code, timeout)
            failures[case] = reason
            print(f"otil-xdit eval: {case} failed: {reason}; all it wrote is in {launch.log}", file=sys.stderr)
        else:
            launch.clean_up()
    return failures


class _Launch:
    """One torchrun and what it left: a plan, a log, and a note from each rank that failed."""

    def __init__(self, cases: Sequence[Case], matrix: Matrix, store: Store, processes: int) -> None:
        self._store, self._processes = store, processes
        self._calls: dict[Case, list[Call]] = {}
        planned: set[Path] = set()
        for case in cases:  # variants with the same settings share their images
            calls = [call for call in store.missing(case) if store.path(case, call) not in planned]
            planned |= {store.path(case, call) for call in calls}
            if calls:
                self._calls[case] = calls
        self._cases = list(self._calls)
        self._folder = Path(tempfile.mkdtemp(prefix=f"run-{processes}-", dir=store.folder))
        self.log = self._folder / "log.txt"
        self._plan = self._folder / "plan.json"
        self._plan.write_text(json.dumps(self._written(matrix), indent=1))

    def run(self, timeout: float) -> int:
        """The torchrun's exit code, when it has ended."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(self._processes), "-m", WORKER, str(self._plan)]
        paths = [self._store.path(case, call) for case, calls in self._calls.items() for call in calls]
        name = "one process" if self._cases[0].variant is None else f"{self._processes} ranks"
        with progress(len(paths), "image", name) as bar:
            watch = _Watch(paths, bar, timeout)
            code = run_to_end(
                command, rank_environment(), program="otil-xdit eval", log=self.log, is_stuck=watch.is_stuck
            )
            watch.count()
        return code

    def clean_up(self) -> None:
        """Remove plan and log; those of a torchrun that failed are worth reading."""
        shutil.rmtree(self._folder)

    def blame(self, code: int, timeout: float) -> tuple[Case, str]:
        """The case that stopped the torchrun, and why: what the first rank that failed says, where one could."""
        notes = [json.loads(path.read_text()) for path in self._folder.glob("failed-*.json")]
        if notes:
            first = min(notes, key=lambda note: float(note["time"]))
            return self._cases[first["case"]], f"rank {first['rank']}: {first['error']}"
        case = next(case for case in self._cases if self._store.missing(case))
        if code == STUCK:
            return case, f"no image within {timeout:g} s"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return case, f"exit code {code}: {lines[-1] if lines else 'no output'}"

    def _written(self, matrix: Matrix) -> dict[str, object]:
        cases = [
            {
                "folder": case.model.folder,
                "sampler": case.sampler.name,
                "steps": case.sampler.steps,
                "variant": None if case.variant is None else case.variant.text,
                "images": [
                    {"prompt": call.prompt, "seed": call.seed, "key": self._store.key(case, call)} for call in calls
                ],
            }
            for case, calls in self._calls.items()
        ]
        return {
            "cases": cases,
            "guidance": matrix.guidance,
            "size": matrix.size,
            "lora": matrix.lora,
            "store": str(self._store.folder.resolve()),
        }


class _Watch:
    """Counts images as they appear, and says when none has for too long."""

    def __init__(self, paths: Sequence[Path], bar: tqdm, timeout: float) -> None:
        self._paths, self._bar, self._timeout = set(paths), bar, timeout
        self._changed = self._looked = time.monotonic()

    def is_stuck(self) -> bool:
        now = time.monotonic()
        if now - self._looked < WATCH_SECONDS:
            return False
        self._looked = now
        if self.count():
            self._changed = now
        return now - self._changed > self._timeout

    def count(self) -> int:
        """Images that have appeared since the last time."""
        made = {path for path in self._paths if path.is_file()}
        self._paths -= made
        self._bar.update(len(made))
        return len(made)
