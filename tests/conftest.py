"""Fixtures that several test files share."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from otil_xdit.xdit.launcher import main as cli
from tests.support.fork_server import stop_servers


def pytest_sessionfinish() -> None:
    """End the processes that ranks are forked from."""
    stop_servers()


@pytest.fixture(autouse=True)
def no_rank() -> Iterator[None]:
    """The process of the tests does not become a rank: tests after it would start as one."""
    yield
    left = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT") if name in os.environ]
    for name in left:
        del os.environ[name]
    assert not left, f"the test left {', '.join(left)} in the environment"


@pytest.fixture
def cpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher sees no accelerator, whatever this machine has."""
    monkeypatch.setattr(cli, "visible_devices", lambda: 0)


@pytest.fixture
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process, loading weights or asking the hub fails the test."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("started")

    import huggingface_hub
    from diffusers import DiffusionPipeline

    monkeypatch.setattr(subprocess, "Popen", fail)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
