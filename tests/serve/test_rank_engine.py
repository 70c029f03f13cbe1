"""The supervision of the ranks, with a stand-in for them: losses, restarts, cancels, ends."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace

import psutil
import pytest

from otil_xdit.serve import rank_engine, restarts
from otil_xdit.serve.engine import Cancelled, EngineFailure, Refused
from otil_xdit.serve.planning import RanksLaunch
from otil_xdit.serve.rank_engine import RankEngine
from otil_xdit.serve.requests import ImageRequest
from otil_xdit.serve.settings import ServeSettings

SETTINGS = ServeSettings("fake", silence_timeout=1.0)
LIMIT = 30.0
"""Seconds after which a test counts as hanging."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that a test can wait for."""
    monkeypatch.setattr(restarts, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(rank_engine, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(rank_engine, "GOODBYE_SECONDS", 5.0)


def play(
    scene: Callable[[RankEngine], Awaitable[None]], settings: ServeSettings = SETTINGS, flags: tuple[str, ...] = ()
) -> None:
    """Play a scene with an engine, and see that nothing is left of it."""

    async def run() -> None:
        command = (sys.executable, "-m", "tests.support.fake_ranks", "--nnodes=1", *flags)
        engine = RankEngine(RanksLaunch(command, dict(os.environ)), settings)
        await engine.start()
        try:
            await asyncio.wait_for(scene(engine), LIMIT)
        finally:
            await engine.stop()
        assert engine.status.state == "stopped"

    before = set(psutil.Process().children())
    asyncio.run(run())
    assert not [
        one for one in psutil.Process().children() if one not in before and one.status() != psutil.STATUS_ZOMBIE
    ]


async def draw(engine: RankEngine, prompt: str) -> bytes:
    """Return the bytes of an image."""
    made = await engine.draw([ImageRequest(prompt, 0)], lambda step: None)
    return made[0].pixels.data


def test_an_image_and_its_cost() -> None:
    async def scene(engine: RankEngine) -> None:
        await engine.wait_until_ready()
        assert engine.facts is not None and (engine.facts.model, engine.facts.ranks) == ("fake", 2)
        steps = []
        (made,) = await engine.draw([ImageRequest("red", 0)], lambda step: steps.append((step.step, step.steps)))
        assert (made.pixels.data, made.seconds, made.sent_bytes) == (b"red", 0.5, 10) and steps == [(1, 2), (2, 2)]

    play(scene)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("die", "the ranks ended with exit code 7: rank 1 was ended by SIGKILL (last seen: rank 0 layer a at step 1)"),
        ("hang", "rank 0 has said nothing for 1 s, last seen at layer a at step 1"),
        ("other", "rank 1 has said nothing for 99 s, last seen at layer b at step 2"),
        ("lose", "rank 0: rank 1 says nothing"),
    ],
)
def test_a_loss_names_the_rank_and_the_next_image_is_made(prompt: str, reason: str) -> None:
    async def scene(engine: RankEngine) -> None:
        await engine.wait_until_ready()
        await asyncio.sleep(0.1)  # for a sign of life
        with pytest.raises(EngineFailure) as lost:
            await draw(engine, prompt)
        assert reason in str(lost.value)
        assert engine.status.state == "restarting" and reason in engine.status.reason
        with pytest.raises(EngineFailure):
            await draw(engine, "red")
        await engine.wait_until_ready()
        assert await draw(engine, "red") == b"red" and engine.status.restarts == 1

    play(scene)


def test_refusals_and_failures_of_one_image_restart_nothing() -> None:
    async def scene(engine: RankEngine) -> None:
        await engine.wait_until_ready()
        with pytest.raises(Refused, match="no such size"):
            await draw(engine, "refuse")
        with pytest.raises(EngineFailure, match="OutOfMemoryError"):
            await draw(engine, "fail")
        assert await draw(engine, "red") == b"red" and engine.status.restarts == 0

    play(scene)


def test_a_cancel_ends_the_image() -> None:
    async def scene(engine: RankEngine) -> None:
        await engine.wait_until_ready()
        engine.cancel()  # without an image nothing happens
        drawing = asyncio.create_task(draw(engine, "slow"))
        await asyncio.sleep(0.1)
        engine.cancel()
        with pytest.raises(Cancelled, match="after step"):
            await drawing
        assert await draw(engine, "red") == b"red"

    play(scene)


def test_ranks_that_take_no_cancel_are_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_engine, "CANCEL_SECONDS", 0.3)

    async def scene(engine: RankEngine) -> None:
        await engine.wait_until_ready()
        drawing = asyncio.create_task(draw(engine, "deaf"))
        await asyncio.sleep(0.1)
        engine.cancel()
        with pytest.raises(EngineFailure, match="did not end a cancelled image"):
            await drawing
        await engine.wait_until_ready()
        assert await draw(engine, "red") == b"red"

    play(scene)


def test_too_many_losses_in_a_row_are_the_end_and_images_start_the_count_again() -> None:
    async def lose(engine: RankEngine) -> None:
        await engine.wait_until_ready()
        with pytest.raises(EngineFailure):
            await draw(engine, "die")

    async def scene(engine: RankEngine) -> None:
        for _ in range(2):
            await lose(engine)
        await engine.wait_until_ready()
        await draw(engine, "red")
        for _ in range(3):
            await lose(engine)
        with pytest.raises(EngineFailure, match="SIGKILL"):
            await engine.wait_until_ready()
        assert (engine.status.state, engine.status.restarts) == ("failed", 4)

    play(scene, replace(SETTINGS, max_restarts=2))


def test_ranks_that_cannot_be_started_are_not_started_again() -> None:
    async def scene(engine: RankEngine) -> None:
        with pytest.raises(EngineFailure, match="--model fake: no such file"):
            await engine.wait_until_ready()
        assert engine.status.state == "failed"

    play(scene, flags=("--broken",))


def test_an_end_in_the_middle_of_an_image_answers_it() -> None:
    async def scene(engine: RankEngine) -> None:
        await engine.wait_until_ready()
        lost = asyncio.create_task(draw(engine, "deaf"))
        await asyncio.sleep(0.1)
        await engine.stop()
        with pytest.raises(EngineFailure, match="shutting down"):
            await asyncio.wait_for(lost, 1.0)

    play(scene)
