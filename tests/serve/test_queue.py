"""The queue: who waits, who is refused, and that every accepted job comes to an end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from otil_xdit.serve.engine import EngineStatus
from otil_xdit.serve.job import Job
from otil_xdit.serve.jobs import Jobs, QueueFull
from otil_xdit.serve.requests import DrawnImage, ImageRequest, StepDone
from tests.support.fake_engine import FakeEngine

LIMIT = 10.0
"""Seconds after which a test counts as hanging."""


def job(n: int = 1, steps: int = 4) -> Job:
    return Job(tuple(ImageRequest("a", seed, steps=steps) for seed in range(n)))


def run(
    scene: Callable[[FakeEngine, Jobs], Awaitable[None]], limit: int = 2, seconds: float = LIMIT, most: int = 1
) -> None:
    """Play a scene with a queue that is at work."""

    async def play() -> None:
        engine = FakeEngine()
        jobs = Jobs(engine, limit, seconds, most=most)
        work = asyncio.create_task(jobs.run())
        await asyncio.wait_for(scene(engine, jobs), LIMIT)
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work

    asyncio.run(play())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_jobs_are_done_in_their_order() -> None:
    async def scene(engine: FakeEngine, jobs: Jobs) -> None:
        first, second = jobs.submit(job(2)), jobs.submit(job())
        await asyncio.gather(first.wait(), second.wait())
        assert [len(one.images) for one in (first, second)] == [2, 1]
        assert (first.stage, second.stage) == ("done", "done")

    run(scene)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def scene(engine: FakeEngine, jobs: Jobs) -> None:
        engine.gate.clear()
        running = jobs.submit(job())
        await until(lambda: jobs.current is running)
        waiting = [jobs.submit(job()), jobs.submit(job())]
        with pytest.raises(QueueFull) as refused:
            jobs.submit(job())
        assert refused.value.retry_after > 0
        engine.gate.set()
        await asyncio.gather(*(one.wait() for one in [running, *waiting]))
        assert jobs.submit(job()).stage == "waiting"

    run(scene)


def test_without_a_queue_one_job_at_a_time_is_taken() -> None:
    async def scene(engine: FakeEngine, jobs: Jobs) -> None:
        engine.gate.clear()
        first = jobs.submit(job())
        with pytest.raises(QueueFull):
            jobs.submit(job())
        await until(lambda: jobs.current is first)
        with pytest.raises(QueueFull):
            jobs.submit(job())
        engine.gate.set()
        await first.wait()
        await until(lambda: jobs.current is None)
        await jobs.submit(job()).wait()

    run(scene, limit=0)


def test_cancelling_ends_the_image_under_way_and_those_that_wait() -> None:
    async def scene(engine: FakeEngine, jobs: Jobs) -> None:
        engine.gate.clear()
        running, waiting = jobs.submit(job(3)), jobs.submit(job())
        await until(lambda: running.progress is not None)
        jobs.end(waiting, "cancelled", "the client is gone")
        assert waiting.is_over and not engine.cancels
        jobs.end(running, "cancelled", "the client is gone")
        await running.wait()
        assert (running.stage, engine.cancels, len(engine.asked)) == ("cancelled", 1, 1)
        engine.gate.set()
        last = jobs.submit(job())
        await last.wait()
        assert last.stage == "done"

    run(scene)


def test_a_late_job_is_ended_wherever_it_is() -> None:
    async def scene(engine: FakeEngine, jobs: Jobs) -> None:
        engine.gate.clear()
        running, waiting = jobs.submit(job()), jobs.submit(job())
        await asyncio.gather(running.wait(), waiting.wait())
        assert (running.stage, waiting.stage) == ("late", "late") and "0.05 s" in running.problem

    run(scene, seconds=0.05)


def test_waiting_jobs_go_on_after_a_restart_and_end_when_there_is_none() -> None:
    async def scene(engine: FakeEngine, jobs: Jobs) -> None:
        engine.status = EngineStatus("restarting")
        waiting = jobs.submit(job())
        await asyncio.sleep(0.05)
        assert waiting.stage == "waiting"
        engine.status = EngineStatus("ready")
        await waiting.wait()
        assert waiting.stage == "done"
        engine.status = EngineStatus("failed", "rank 1 was lost")
        lost = jobs.submit(job())
        await lost.wait()
        assert (lost.stage, lost.problem) == ("unserved", "rank 1 was lost")

    run(scene)


def test_alike_jobs_are_made_together_and_a_cancelled_one_does_not_stop_the_others() -> None:
    async def scene(engine: FakeEngine, jobs: Jobs) -> None:
        engine.gate.clear()
        first = jobs.submit(job())
        await until(lambda: jobs.current is first)
        alike = [jobs.submit(Job((ImageRequest(text, number, steps=2),))) for number, text in enumerate("abcd")]
        other = jobs.submit(job(steps=3))
        engine.gate.set()
        await first.wait()
        engine.gate.clear()
        await until(lambda: jobs.current is alike[0])
        jobs.end(alike[1], "cancelled", "the client is gone")
        assert alike[1].is_over and not engine.cancels
        engine.gate.set()
        await asyncio.gather(*(one.wait() for one in [*alike, other]))
        assert [len(one) for one in engine.calls] == [1, 3, 1, 1], "three alike, the fourth, and the other one"
        assert [one.images[0].pixels.data[0] for one in (alike[0], alike[2], alike[3])] == [0, 2, 3]

    run(scene, limit=9, most=3)


def test_followers_see_steps_and_every_image() -> None:
    async def scene(engine: FakeEngine, jobs: Jobs) -> None:
        followed = jobs.submit(job(3))
        news = [one async for one in followed.follow()]
        assert sum(isinstance(one, DrawnImage) for one in news) == 3
        assert any(isinstance(one, StepDone) for one in news)

    run(scene)
