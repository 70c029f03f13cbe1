"""The launcher of bench and eval: each rank has its question, and a rank that fails or is late is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from otil_xdit.tools.common.jobs import Interrupted, JobFailed, jobs_of_a_run
from tests.support.rank_tasks import ObedientTask

LIMIT = 20.0  # seconds; a rank loads in 3 on an idle machine


def test_each_rank_has_its_question_and_the_one_that_fails_is_named(tmp_path: Path) -> None:
    with jobs_of_a_run(tmp_path, LIMIT, []) as jobs:
        job = jobs.start("obedient", ObedientTask(), 2)
        answers = jobs.ask(job, ["first"])
        assert answers == [{"rank": 0, "question": "first"}, {"rank": 1, "question": None}]
        with pytest.raises(JobFailed, match="obedient: rank 1: ValueError: as told; see ") as failed:
            jobs.ask(job, ["sleep", "raise"])
        assert "ValueError: as told" in failed.value.log.read_text()
    assert all(process.returncode is not None for process in job.processes)


def test_a_late_rank_is_named_and_a_signal_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[int] = []
    with jobs_of_a_run(tmp_path, LIMIT, caught) as jobs:
        job = jobs.start("obedient", ObedientTask(), 2)
        monkeypatch.setattr(jobs, "_limit", 1.0)
        with pytest.raises(JobFailed, match="rank 1 gave no answer within 1 s"):
            jobs.ask(job, ["", "sleep"])
        caught.append(15)
        with pytest.raises(Interrupted, match="SIGTERM, all processes stopped") as stopped:
            jobs.ask(job, ["", ""])
        assert stopped.value.code == 143
