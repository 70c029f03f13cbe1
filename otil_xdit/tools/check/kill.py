"""Part "kill": a rank is killed in the middle of an image; the others say which one, and no process stays."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import psutil

from otil_xdit.catalog.bundled import model_folder
from otil_xdit.catalog.folders import OWN, load_pipe
from otil_xdit.tools.check.rank import Call, draw, parallel
from otil_xdit.tools.check.runner import Check, Finding
from otil_xdit.tools.common.jobs import Job

MODEL = "tiny-sd"

STEP = 3
"""At whose end the rank is killed."""

ENDING_SECONDS = 10.0
"""For a rank to say what it saw, and to end."""


def run(check: Check) -> Finding:
    """Kill the last rank, and watch the others."""
    try:
        return _watch(check, check.ranks())
    finally:
        check.end_ranks()


def _watch(check: Check, job: Job) -> Finding:
    timeout, victim = check.settings.timeout, job.ranks - 1
    family = [psutil.Process(process.pid) for process in job.processes]
    family += [child for process in family for child in process.children(recursive=True)]
    job.resume()
    for connection in job.connections.values():
        connection.send(Call(draw_and_die, {"steps": check.settings.steps, "timeout": timeout, "victim": victim}))
    psutil.wait_procs([family[victim]], max(ENDING_SECONDS, check.seconds - timeout))
    killed = time.time()
    deadline = time.monotonic() + timeout + ENDING_SECONDS
    seen = [_heard(job, rank, deadline) for rank in range(victim)]
    _, left = psutil.wait_procs(family, ENDING_SECONDS)
    wrong = [text for rank, one in enumerate(seen) if (text := judge(rank, one, victim, killed, timeout))]
    named = len(seen) - len(wrong)
    wrong += [f"{len(left)} processes stayed"] * bool(left)
    seconds = [one["time"] - killed for one in seen if one is not None]
    after = f" within {max(seconds):.1f} s (limit {timeout:g})" if seconds else ""
    said = f"rank {victim} named by {named} of {len(seen)} others{after}, {len(left)} processes stayed"
    errors = [None if one is None else one["error"] for one in seen]
    data = {"victim": victim, "errors": errors, "seconds": seconds, "left": len(left)}
    return Finding(said, data, "\n".join([f"{said}.", "", *(f"    {error}" for error in errors)]), tuple(wrong))


def judge(rank: int, seen: dict[str, Any] | None, victim: int, killed: float, timeout: float) -> str:
    """Return what is wrong with what a rank said; empty for nothing.

    Args:
        rank: this one.
        seen: its answer, None for none.
        victim: the rank that was killed.
        killed: when, in seconds since the epoch.
        timeout: of the ranks' settings.
    """
    if seen is None:
        return f"rank {rank} said nothing"
    if f"rank {victim}" not in seen["error"].partition(";")[2]:
        return f"rank {rank} does not name rank {victim}: {seen['error']}"
    if seen["time"] - killed > timeout + 1:
        return f"rank {rank} needed {seen['time'] - killed:.0f} s, more than {timeout:g}"
    return ""


def _heard(job: Job, rank: int, deadline: float) -> dict[str, Any] | None:
    """Return a rank's error with its time; None where it has none in time."""
    try:
        if not job.connections[rank].poll(max(0.0, deadline - time.monotonic())):
            return None
        answer: dict[str, Any] = job.connections[rank].recv()
    except (EOFError, OSError):
        return None
    return answer if "error" in answer else None


def draw_and_die(steps: int, timeout: float, victim: int) -> dict[str, Any]:
    """Draw an image in whose middle the victim is killed; never answers."""

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == STEP and int(os.environ["RANK"]) == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return tensors

    pipe = load_pipe(model_folder(MODEL), OWN, None)
    with parallel(pipe, "otil", timeout=timeout) as shared:
        draw(shared, steps, callback_on_step_end=on_step_end)
    return {}
