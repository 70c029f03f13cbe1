"""The command ``xfuser serve``: check the flags, start the ranks, answer requests, end it all."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from types import FrameType
from typing import TYPE_CHECKING

from otil_xdit.errors import FlagError
from otil_xdit.serve.planning import RanksLaunch, plan_ranks
from otil_xdit.serve.restarts import Restarts
from otil_xdit.serve.settings import ServeSettings, parser_of_flags, read_settings
from otil_xdit.xdit.launcher.processes import run_to_end

if TYPE_CHECKING:
    import uvicorn

    from otil_xdit.serve.rank_engine import RankEngine
    from otil_xdit.serve.service import Service

logger = logging.getLogger(__name__)

NEEDED = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "PIL": "pillow",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}
"""Modules of the extra ``serve``, and the packages that bring them."""


def main(arguments: Sequence[str]) -> int:
    """Serve until a signal comes, and return the exit code."""
    try:
        _check_installed()
        if {"-h", "--help"} & set(arguments):
            return _show_help()
        settings, others = read_settings(arguments)
        listener = _listen(settings)
        launch = plan_ranks(others, settings.warmup_prompt)
    except FlagError as error:
        print(f"xfuser: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if launch.note is not None:
        print(f"xfuser: {launch.note}", file=sys.stderr)
    if "--node_rank=0" not in launch.command:
        listener.close()
        return _follow(launch, settings)
    return serve(launch, settings, listener)


def serve(launch: RanksLaunch, settings: ServeSettings, listener: socket.socket) -> int:
    """Serve the app round these ranks until a signal comes.

    Args:
        launch: how to start the ranks.
        settings: the server's.
        listener: what clients connect to.

    Returns:
        The exit code.
    """
    import uvicorn

    from otil_xdit.serve.app import create_app
    from otil_xdit.serve.logs import log_to_stderr
    from otil_xdit.serve.rank_engine import RankEngine

    log_to_stderr()
    engine = RankEngine(launch, settings)
    app = create_app(engine, settings)

    class Server(uvicorn.Server):
        """Finishes what was accepted, within the time for it, when a signal comes."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            first = not self.should_exit
            super().handle_exit(sig, frame)
            if first:
                loop.call_soon_threadsafe(lambda: draining.append(loop.create_task(_drain(app.state.service))))

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.shutdown_timeout + _ANSWER_SECONDS),
    )
    draining: list[asyncio.Task[None]] = []
    server = Server(config)
    loop = asyncio.new_event_loop()

    async def run() -> None:
        watch = asyncio.create_task(_exit_without_a_model(engine, server))
        host, port = listener.getsockname()[:2]
        logger.info("listening", extra={"address": f"http://{f'[{host}]' if ':' in host else host}:{port}"})
        if settings.api_key is None and not ipaddress.ip_address(host).is_loopback:
            logger.warning("everybody who reaches this address may use the server; give --api_key")
        await server.serve(sockets=[listener])
        watch.cancel()

    try:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(run())
    except KeyboardInterrupt:  # uvicorn raises the signal again when all is done
        return 128 + signal.SIGINT
    finally:
        loop.close()
    return 1 if engine.status.state == "failed" or not server.started else 0


_ANSWER_SECONDS = 10.0
"""What cancelled images and their answers may take at the end."""


async def _drain(service: Service) -> None:
    """Accept no more; let what was accepted end within the time for it, and answer the rest that it was not served."""
    service.is_draining = True
    seconds = service.settings.shutdown_timeout
    logger.info("shutting down", extra={"waiting": len(service.jobs), "seconds": seconds})
    try:
        await asyncio.wait_for(service.jobs.wait_until_empty(), seconds)
    except asyncio.TimeoutError:
        service.jobs.end_all(f"the server is shutting down, and was not done within {seconds:g} s")


async def _exit_without_a_model(engine: RankEngine, server: uvicorn.Server) -> None:
    """Let the server end when its ranks cannot even be started once: whoever started it should see that."""
    while engine.status.state == "loading":
        await asyncio.sleep(0.1)
    if engine.status.state == "failed":
        print(f"xfuser: error: {engine.status.reason}", file=sys.stderr)
        server.should_exit = True


def _follow(launch: RanksLaunch, settings: ServeSettings) -> int:
    """Run this machine's ranks of a server on another machine, again when they were lost."""
    restarts = Restarts(settings.max_restarts)
    while True:
        begun = time.monotonic()
        code = run_to_end(launch.command, launch.environment)
        # A rank that was killed gives more than 128, too; these two are what this process was told itself.
        if code in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM):
            return code
        if time.monotonic() - begun > _STEADY_SECONDS:
            restarts.count_anew()
        pause = restarts.next_pause()
        if pause is None:
            return 1
        print(f"xfuser: the ranks of this machine ended with exit code {code}", file=sys.stderr)
        time.sleep(pause)


_STEADY_SECONDS = 600.0
"""What ranks of another machine's server must have lived for, so that their losses are counted anew."""


def _listen(settings: ServeSettings) -> socket.socket:
    """Return what clients connect to, before anything is loaded.

    Raises:
        FlagError: for an address that is not this machine's, or is taken.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise FlagError(f"--host {settings.host} --port {settings.port}: {os.strerror(error.errno or 0)}") from error


def _check_installed() -> None:
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise FlagError(f"serve needs {', '.join(missing)}; pip install 'otil-xdit[serve]'")


def _show_help() -> int:
    """Print the server's flags, and then the launcher's."""
    print(parser_of_flags().format_help())
    print("All flags of `xfuser` hold, too:\n", flush=True)
    return subprocess.run([sys.executable, "-m", "otil_xdit.serve.planning", "--help"]).returncode
