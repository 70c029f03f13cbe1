"""A process ends when its parent was killed, also one that does not listen to SIGTERM; others stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from otil_xdit.xdit.launcher.orphans import PARENT

CHILD = """
import signal, time
from otil_xdit.xdit.launcher.orphans import end_with_parent
if {deaf}: signal.signal(signal.SIGTERM, lambda number, frame: None)
end_with_parent(0.5)
print("up", flush=True)
time.sleep(60)
"""
START = """
import os, subprocess, sys, time
if {asks}: os.environ[{parent!r}] = str(os.getpid())
child = subprocess.Popen([sys.executable, "-c", {child!r}])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("asks", "deaf", "ends"), [(True, False, True), (True, True, True), (False, False, False)])
def test_who_is_asked_to_ends_with_its_parent(asks: bool, deaf: bool, ends: bool) -> None:
    script = START.format(asks=asks, parent=PARENT, child=CHILD.format(deaf=deaf))
    environment = {name: value for name, value in os.environ.items() if name != PARENT}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert parent.stdout.readline() == "up\n"
        parent.send_signal(signal.SIGKILL)
        over = time.monotonic() + (20 if ends else 1.5)
        while is_alive(child) and time.monotonic() < over:
            time.sleep(0.05)
        is_left = is_alive(child)
        if is_left:
            child.kill()
        assert is_left != ends


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
