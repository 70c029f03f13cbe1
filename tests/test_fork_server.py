"""The processes that ranks of tests are forked from: each is like a fresh one, and none is left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import torch
import torch.distributed as dist

from tests.support import torchrun
from tests.support.fork_server import ForkServer, server
from tests.support.ranks import run_ranks

PRINT = "import json, os, sys; print(json.dumps({}), flush=True)"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of a script that `lines_of` finds."""
    monkeypatch.setattr(torchrun, "WORKERS", tmp_path)
    return tmp_path / "script.py"


def look_and_spoil() -> dict[str, Any]:
    """Say what a rank finds, then leave it changed for those that would come after it in the same process."""
    found = {
        "pid": os.getpid(),
        "group": os.getpgid(0),
        "spoilt": [hasattr(sys, "spoilt"), "SPOILT" in os.environ],
        "hash": hash("a string"),
        "random": [random.random(), numpy.random.random(), torch.rand(()).item()],
        "ours": sorted(name for name in sys.modules if name.startswith("otil_xdit.")),
        "imported": {"xfuser", "diffusers", "transformers", "peft"} <= set(sys.modules),
    }
    sys.spoilt = True  # type: ignore[attr-defined]
    os.environ["SPOILT"] = "1"
    return found


def test_a_rank_is_like_a_fresh_process() -> None:
    ranks = run_ranks(2, look_and_spoil) + run_ranks(2, look_and_spoil)
    assert all(rank["imported"] for rank in ranks), "a server has not imported what it should"
    assert all(rank["ours"] == ["otil_xdit.xdit", "otil_xdit.xdit.cpu"] for rank in ranks)
    assert not any(sum((rank["spoilt"] for rank in ranks), [])), "a rank sees what an earlier one has left"
    assert all(rank["group"] == rank["pid"] for rank in ranks)
    assert len({number for rank in ranks for number in rank["random"]}) == 12
    assert ranks[0]["hash"] != ranks[1]["hash"]


def count_threads_of_server() -> None:
    """Leave with the number of threads of the process that this one was forked from."""
    sys.exit(psutil.Process(os.getppid()).num_threads())


def test_a_server_has_one_thread() -> None:
    assert server(0).fork(count_threads_of_server, environment=os.environ, path=sys.path).wait(60) == 1


def test_a_script_runs_as_under_torchrun(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "MINE"]
    seen = f"[[os.environ[name] for name in {names}], sys.argv[1:], sys.path[0], os.getcwd(), __name__, __file__]"
    script.write_text(PRINT.format(f"{{'seen': {seen}}}"))
    monkeypatch.setenv("MINE", "5")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    lines = [line["seen"] for line in torchrun.lines_of(2, "script.py", "a", "--b")]
    rest = [["a", "--b"], str(tmp_path), str(tmp_path / "folder"), "__main__", str(script)]
    assert sorted(lines) == [[[str(rank), str(rank), "2", "2", "1", "5"], *rest] for rank in (0, 1)]


def test_a_rank_that_fails_ends_the_others(script: Path) -> None:
    script.write_text(
        f"{PRINT.format('{}')}\nimport time\n"
        "if os.environ['RANK'] == '0': time.sleep(60)\nraise ValueError('of rank 1')"
    )
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"exit codes \[-15, 1\][\s\S]*ValueError: of rank 1"):
        torchrun.lines_of(2, "script.py")
    assert torchrun.lines_of(2, "script.py", may_fail=True) == [{}, {}]
    assert time.monotonic() - began < 30


def test_a_deadline_ends_ranks_and_what_they_have_started(script: Path, tmp_path: Path) -> None:
    script.write_text(
        "import os, signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"print(os.getpid(), child.pid, file=open({str(tmp_path / 'pids')!r} + os.environ['RANK'], 'w'), flush=True)\n"
        "print('I sleep', file=sys.stderr, flush=True); time.sleep(60)"
    )
    with pytest.raises(subprocess.TimeoutExpired, match="script.py") as raised:
        torchrun.lines_of(2, "script.py", timeout=2)
    assert raised.value.stderr == "I sleep\n" * 2
    pids = [int(pid) for rank in "01" for pid in (tmp_path / f"pids{rank}").read_text().split()]
    gone, left = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5)
    assert len(pids) == 4 and not left


def die(number: int) -> None:
    os.kill(os.getpid(), number if dist.get_rank() == 1 else 0)


def test_a_rank_that_is_killed_is_named() -> None:
    with pytest.raises(AssertionError, match="^rank 1 died with exit code -9$"):
        run_ranks(2, die, signal.SIGKILL)


def test_a_rank_that_hangs_is_named() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[1\] are not done"):
        run_ranks(2, sleep_on_rank_1, deadline=1)


def sleep_on_rank_1() -> None:
    time.sleep(60 if dist.get_rank() else 0)


def test_nothing_outlives_the_tests() -> None:
    """A server ends with what it has forked when nobody can ask it any more, as when the tests are killed."""
    server = ForkServer(preload=False)
    process = server.fork(time.sleep, 60, environment=os.environ)
    server.close()
    assert not psutil.pid_exists(process.pid)
