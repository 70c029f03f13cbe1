"""Several images at a time on many cards: `xfuser serve`'s app in replicas of Ray Serve.

    pip install "otil-xdit[serve]" "ray[serve]"
    serve run examples.ray_serve:build flags="--model SDXL --parallel otil --patch_degree 2" cards=2 max_replicas=4

One replica is one placement group, of the cards that make one image together; Ray starts 1 to ``max_replicas`` of
them as requests come. Inside each is the app of `xfuser serve` with ranks of its own, which it starts again when they
are lost.

In front of them `Front` takes requests. One whose replica is lost before anything was answered is sent to another
replica, so nobody sees the loss. What lives in one replica is not to be had from here: addresses of
``response_format=url``, progress and interrupt of AUTOMATIC1111's API. ``/health`` and ``/metrics`` are those of any
one replica.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from otil_xdit.serve.app import create_app
from otil_xdit.serve.planning import plan_ranks
from otil_xdit.serve.rank_engine import RankEngine
from otil_xdit.serve.settings import read_settings

TRIES = 4
"""Replicas that are asked for an answer at most, one after the other."""

AT_ONCE = 4
"""Requests that wait in one replica, the one under way included; more wait in front, and let Ray start replicas."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Call:
    """A request of HTTP, as it goes to a replica.

    Attributes:
        scope: of ASGI, without what belongs to this process.
        body: all of it.
    """

    scope: dict[str, Any]
    body: bytes


class Images:
    """A replica: the app of `xfuser serve`, and the ranks of one image.

    Args:
        flags: of `xfuser serve`, as in a shell.
    """

    async def __init__(self, flags: str) -> None:
        settings, others = read_settings(shlex.split(flags))
        launch = await asyncio.to_thread(plan_ranks, others, settings.warmup_prompt)
        self._engine = RankEngine(launch, settings)
        self._app = create_app(self._engine, settings)
        self._life = AsyncExitStack()
        await self._life.enter_async_context(self._app.router.lifespan_context(self._app))
        await self._engine.wait_until_ready()

    async def answer(self, call: Call) -> AsyncIterator[dict[str, Any]]:
        """Yield the messages of ASGI that the app sends; the image is cancelled when nobody takes them any more."""
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        gone = asyncio.Event()
        body = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app({**call.scope, "app": self._app}, receive, messages.put)
            finally:
                await messages.put(None)

        work = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            gone.set()
            await work

    def check_health(self) -> None:
        """Let Ray start this replica again when its ranks are given up."""
        if self._engine.status.state == "failed":
            raise RuntimeError(self._engine.status.reason)

    async def __del__(self) -> None:
        await self._life.aclose()


class Front:
    """Takes requests of HTTP, and hands each to a replica; to another one when that is lost.

    Args:
        images: the replicas.
    """

    def __init__(self, images: DeploymentHandle) -> None:
        self._images = images.options(stream=True, method_name="answer")

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        kept = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "server")
        scope = {"root_path": "", **{name: request.scope[name] for name in kept if name in request.scope}}
        call = Call(scope, await request.body())
        for number in range(1, TRIES + 1):
            messages = self._images.remote(call)
            try:
                start = await anext(messages)
            except (RayActorError, ReplicaUnavailableError) as error:
                logger.warning(f"a replica was lost with {scope['path']}, try {number} of {TRIES}: {error}")
                continue
            response = StreamingResponse(_bodies(messages), start["status"])
            response.raw_headers = [pair for pair in start["headers"] if pair[0] != b"content-length"]
            return response
        message = f"{TRIES} replicas were lost with this request"
        return JSONResponse({"error": {"message": message, "type": "server_error"}, "detail": message}, 500)


async def _bodies(messages: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async for message in messages:
        yield message.get("body", b"")


def build(arguments: dict[str, str]) -> serve.Application:
    """Return the application.

    Args:
        arguments: ``flags`` of `xfuser serve`; ``cards`` of one image, 0 for ranks on the CPU; ``ranks`` of one image,
            where they are not as many as cards; ``min_replicas`` and ``max_replicas``; ``upscale_delay_s`` of Ray's
            autoscaling.
    """
    cards = int(arguments.get("cards", 1))
    ranks = int(arguments.get("ranks", max(cards, 1)))
    # One bundle, as a replica sees only the cards of its own.
    resources = {"CPU": ranks, **({"GPU": cards} if cards else {})}
    images = serve.deployment(
        Images,
        ray_actor_options={"num_cpus": ranks, "num_gpus": cards},
        placement_group_bundles=[resources],
        placement_group_strategy="STRICT_PACK",
        max_ongoing_requests=AT_ONCE,
        autoscaling_config={
            "min_replicas": int(arguments.get("min_replicas", 1)),
            "max_replicas": int(arguments.get("max_replicas", 1)),
            "target_ongoing_requests": 1,
            "upscale_delay_s": float(arguments.get("upscale_delay_s", 10)),
        },
        graceful_shutdown_timeout_s=60,
    )
    front = serve.deployment(Front, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
    return front.bind(images.bind(arguments["flags"]))
