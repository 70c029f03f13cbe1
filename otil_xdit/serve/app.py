"""`create_app`: the FastAPI app round an engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from otil_xdit import __version__
from otil_xdit.serve.automatic1111 import automatic1111_router
from otil_xdit.serve.engine import Engine
from otil_xdit.serve.middleware import BodyLimit, Envelope, KeyCheck, request_id
from otil_xdit.serve.openai_api import invalid, openai_router
from otil_xdit.serve.page import page_router
from otil_xdit.serve.problems import Problem
from otil_xdit.serve.schemas import ERRORS
from otil_xdit.serve.service import Service
from otil_xdit.serve.settings import ServeSettings

logger = logging.getLogger(__name__)


def create_app(engine: Engine, settings: ServeSettings) -> FastAPI:
    """Return the app. Its lifespan starts the engine and stops it; ``app.state.service`` is the `Service`."""
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.is_draining = False
        await engine.start()
        work = asyncio.create_task(service.jobs.run())
        try:
            yield
        finally:
            service.is_draining = True
            service.jobs.end_all("the server is shutting down")
            await engine.stop()
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work

    app = FastAPI(title="xfuser serve", version=__version__, lifespan=lifespan)
    app.state.service = service
    app.include_router(openai_router(service))
    app.include_router(automatic1111_router(service))
    app.include_router(page_router())
    _add_operation(app, service)
    _add_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limit=settings.max_body)
    app.add_middleware(KeyCheck, key=settings.api_key)
    app.add_middleware(Envelope, metrics=service.metrics)
    return app


def _add_operation(app: FastAPI, service: Service) -> None:
    """Add the routes for whoever looks after the server."""

    @app.get("/health", tags=["operation"], responses={503: {"description": "no image can be made; says why"}})
    async def health() -> JSONResponse:
        """Answer 200 where images can be made."""
        status = service.engine.status
        state = "draining" if service.is_draining else status.state
        body = {
            "status": "ok" if state == "ready" else state,
            "reason": status.reason,
            "restarts": status.restarts,
            "waiting": len(service.jobs),
            "model": service.settings.name,
        }
        return JSONResponse(body, 200 if state == "ready" else 503)

    @app.get("/facts", tags=["operation"], responses={status: ERRORS[status] for status in (401, 503)})
    async def facts() -> dict[str, Any]:
        """Tell what is served, by which ranks, and what a request may ask for."""
        known = service.engine.facts or service.ready_facts()
        limits = service.settings
        return {
            **asdict(known),
            "loras": service.loras.names(),
            "max_pixels": limits.max_pixels,
            "max_steps": limits.max_steps,
            "max_images": limits.max_images,
        }

    @app.get("/liveness", tags=["operation"])
    async def liveness() -> dict[str, str]:
        """Answer 200 while this process serves, whatever the ranks do."""
        return {"status": "alive"}

    @app.get("/metrics", tags=["operation"], response_class=Response)
    async def metrics() -> Response:
        """Return counters for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's shape."""

    @app.exception_handler(Problem)
    async def on_problem(request: Request, error: Problem) -> JSONResponse:
        return error.response(request_id(request))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return invalid(error.errors()).response(request_id(request))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        problem = Problem(error.status_code, str(error.detail))
        response = problem.response(request_id(request))
        response.headers.update(error.headers or {})
        return response
