"""xfuser on CPU ranks: what is overridden exists, and is overridden only where there is no accelerator."""

from __future__ import annotations

import importlib
import subprocess
import sys
from operator import attrgetter
from types import ModuleType, SimpleNamespace

import pytest

from otil_xdit.xdit import cpu

FAKE = cpu.Override("xfuser.envs", "a_name_that_is_not_there", lambda old: old, "to see the check fail")

needs_cpu_machine = pytest.mark.skipif(cpu.has_accelerator(), reason="the overrides are off on this machine")


@pytest.fixture
def xfuser(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("RANK", "0")  # without it, importing xfuser.runner would set it, and more, for the whole process
    assert cpu.enable_cpu_ranks()
    return importlib.import_module("xfuser")


def missing(overrides: tuple[cpu.Override, ...]) -> list[str]:
    """The overridden names that xfuser does not have; importing a module applies its overrides."""
    return [override.attribute for override in overrides if not _exists(override)]


def _exists(override: cpu.Override) -> bool:
    try:
        attrgetter(override.attribute)(importlib.import_module(override.module))
    except AttributeError:
        return False
    return True


@needs_cpu_machine
def test_xfuser_has_every_overridden_name(xfuser: ModuleType) -> None:
    assert missing(cpu.OVERRIDES) == []
    assert missing((*cpu.OVERRIDES, FAKE)) == [FAKE.attribute]


@needs_cpu_machine
def test_a_name_that_disappeared_is_reported_by_name(xfuser: ModuleType) -> None:
    finder = cpu.OverridingFinder((FAKE,))
    with pytest.raises(RuntimeError, match=f"xfuser.envs.{FAKE.attribute} .*no such name"):
        finder.apply(sys.modules["xfuser.envs"])


@needs_cpu_machine
def test_values_on_the_cpu(xfuser: ModuleType) -> None:
    from xfuser import envs
    from xfuser.core.distributed import parallel_state
    from xfuser.model_executor.layers import usp

    assert envs.get_device_version() is None
    assert envs.get_torch_distributed_backend() == "gloo"
    assert envs.get_device_name() == "cpu"
    assert parallel_state.HAS_LONG_CTX_ATTN
    assert usp.PROCESS_GROUP is importlib.import_module("yunchang.globals").PROCESS_GROUP


@needs_cpu_machine
def test_enabling_twice_adds_one_finder(xfuser: ModuleType) -> None:
    assert cpu.enable_cpu_ranks()
    assert sum(isinstance(finder, cpu.OverridingFinder) for finder in sys.meta_path) == 1


def test_nothing_happens_with_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_accelerator", lambda: True)
    others = [finder for finder in sys.meta_path if not isinstance(finder, cpu.OverridingFinder)]
    monkeypatch.setattr(sys, "meta_path", list(others))
    assert not cpu.enable_cpu_ranks()
    assert sys.meta_path == others


def test_importing_the_module_changes_nothing() -> None:
    program = (
        "import sys; before = list(sys.meta_path); import otil_xdit.xdit.cpu; "
        "assert sys.meta_path == before and 'xfuser' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_docstring_lists_every_override() -> None:
    assert [override.attribute for override in cpu.OVERRIDES if f"`{override.attribute}`" not in cpu.__doc__] == []


def override(module: str, attribute: str) -> cpu.Override:
    (found,) = (one for one in cpu.OVERRIDES if one.module.endswith(module) and one.attribute == attribute)
    return found


def test_torch_itself_is_not_changed() -> None:
    import torch

    view = override("xfuser.runner", "torch").replacement(torch)
    view.cuda.synchronize()
    assert view.cuda.Event is cpu.CpuEvent
    assert torch.cuda.Event is not cpu.CpuEvent
    assert view.cuda.is_available is torch.cuda.is_available
    assert view.nn is torch.nn


def test_events_measure_milliseconds() -> None:
    start, end = cpu.CpuEvent(enable_timing=True), cpu.CpuEvent(enable_timing=True)
    start.seconds, end.seconds = 1.0, 1.5
    assert start.elapsed_time(end) == pytest.approx(500.0)


def test_quantised_weights_are_refused() -> None:
    loader = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(use_fp8_gemms=True)))
    with pytest.raises(ValueError, match="use_fp8_gemms=True needs an accelerator"):
        override("loading.placement", "place_pipeline_components").replacement(lambda loader: None)(loader)
