"""xfuser on gloo ranks where there is no accelerator; nothing on a machine that has one.

xfuser refuses to be imported without an accelerator, and its runner times itself with CUDA events. `enable_cpu_ranks()`
replaces the following names, each when xfuser imports the module that defines it (see `OVERRIDES`):

| xfuser file | name | becomes | because |
|---|---|---|---|
| envs.py | `get_device_version` | None | raises, and `import xfuser` calls it |
| envs.py | `get_torch_distributed_backend` | "gloo" | raises |
| envs.py | `_is_cuda`, `_is_hip` | False | tell how torch was built, not what is present |
| envs.py | `PACKAGES_CHECKER.packages_info` | "has_long_ctx_attn" | else there are no Ulysses and ring groups |
| runtime_state.py | `RuntimeState._select_attention_backend` | SDPA if none is named | would pick a build's cuDNN |
| group_coordinator.py, timer.py | `synchronize` | nothing | torch.cuda's raises |
| usp.py, fp8_comms.py, head_balance.py | `PROCESS_GROUP` | yunchang's | is None |
| base_model.py, runner.py | `torch` | with CPU events in its `cuda` | they time with CUDA events |
| krea2.py, pipeline_flux.py, pipeline_stable_diffusion_3.py | `torch` | with CPU generators | they ask for "cuda" |
| placement.py | `place_pipeline_components` | nothing but a check | moves weights to "cuda:N" |

torch itself is left alone: a module that needs another `torch.cuda` gets a view of torch under its own name `torch`.
xfuser must be imported, not run as `__main__`: `python -m xfuser.runner` would not see the view of torch.
xfuser also imports the `triton` package, which must be installed although no kernel of it runs.
"""

from __future__ import annotations

import importlib
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger("otil_xdit")


def enable_cpu_ranks() -> bool:
    """Make xfuser importable and its runner work on gloo, if this machine has no accelerator.

    Calling it again changes nothing.

    Returns:
        Whether the overrides are active.
    """
    if any(isinstance(finder, OverridingFinder) for finder in sys.meta_path):
        return True
    if has_accelerator():
        return False
    finder = OverridingFinder(OVERRIDES)
    for module in [sys.modules[name] for name in finder.overrides if name in sys.modules]:
        finder.apply(module)
    sys.meta_path.insert(0, finder)
    logger.info("no accelerator found: xfuser runs on the CPU, with gloo")
    return True


def has_accelerator() -> bool:
    """Tell whether there is a device that xfuser supports by itself."""
    if find_spec("torch_musa") is not None:
        importlib.import_module("torch_musa")  # adds torch.musa, as xfuser.envs would
    devices = (getattr(torch, name, None) for name in ("cuda", "musa", "npu"))
    return torch.backends.mps.is_available() or any(device is not None and device.is_available() for device in devices)


@dataclass(frozen=True)
class Override:
    """One name of xfuser that means something else on the CPU.

    Attributes:
        module: the xfuser module that uses the name.
        attribute: the name in that module; dots reach into an object.
        replacement: makes the new value from the old one.
        reason: why the old value does not do on the CPU.
    """

    module: str
    attribute: str
    replacement: Callable[[Any], Any]
    reason: str

    def apply(self, module: ModuleType) -> None:
        """Replace the name in the imported module.

        Raises:
            RuntimeError: when this version of xfuser has no such name.
        """
        owner_path, _, name = self.attribute.rpartition(".")
        try:
            owner = attrgetter(owner_path)(module) if owner_path else module
            old = getattr(owner, name)
        except AttributeError as error:
            raise RuntimeError(
                f"otil_xdit.xdit.cpu replaces {self.module}.{self.attribute} ({self.reason}), "
                "but this version of xfuser has no such name"
            ) from error
        setattr(owner, name, self.replacement(old))


class OverridingFinder(MetaPathFinder):
    """Apply overrides to each module right after it has been executed, so that importers see only the new values."""

    def __init__(self, overrides: tuple[Override, ...]) -> None:
        self.overrides: dict[str, list[Override]] = {}
        for override in overrides:
            self.overrides.setdefault(override.module, []).append(override)

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a module with overrides, whose loader applies them; None for all other modules."""
        if fullname not in self.overrides:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        @wraps(execute)
        def execute_then_override(module: ModuleType) -> None:
            execute(module)
            self.apply(module)

        spec.loader.exec_module = execute_then_override  # type: ignore[method-assign]  # of this loader only
        return spec

    def apply(self, module: ModuleType) -> None:
        """Replace all names of an imported module."""
        for override in self.overrides[module.__name__]:
            override.apply(module)


class CpuEvent:
    """A `torch.cuda.Event` for work that is done when the call returns."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        """Take the time."""
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Return at once: nothing is pending."""

    def elapsed_time(self, end: CpuEvent) -> float:
        """Return milliseconds, as torch does."""
        return 1e3 * (end.seconds - self.seconds)


class ModuleView(ModuleType):
    """Show another module, but for the names given."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        super().__init__(module.__name__)
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _always(value: Any) -> Callable[[Any], Any]:
    """Replace a function by one that returns `value` whatever it is called with."""
    return lambda old: lambda *args, **kwargs: value


def _yunchang_groups(old: None) -> Any:
    """Return the process groups that xfuser imports only where there is an accelerator."""
    return importlib.import_module("yunchang.globals").PROCESS_GROUP


def _with_cpu_clock(old: ModuleType) -> ModuleType:
    """Return torch with events that read the host's clock."""
    cuda = ModuleView(old.cuda, Event=CpuEvent, synchronize=lambda device=None: None)
    return ModuleView(old, cuda=cuda)


def _with_cpu_generators(old: ModuleType) -> ModuleType:
    """Return torch with generators on the CPU, whatever device is asked for."""
    return ModuleView(old, Generator=lambda device=None: old.Generator())


def _with_long_context_attention(packages: dict[str, Any]) -> dict[str, Any]:
    """Return xfuser's findings on packages, with yunchang among them."""
    return {**packages, "has_long_ctx_attn": True}


def _sdpa_unless_named(select: Callable[..., Any]) -> Callable[..., Any]:
    """Return xfuser's choice of attention, with SDPA where the user names none."""

    @wraps(select)
    def select_on_cpu(self: Any, engine_config: Any = None) -> Any:
        if engine_config is not None and engine_config.runtime_config.attention_backend:
            return select(self, engine_config)
        return importlib.import_module("xfuser.core.distributed.attention_backend").AttentionBackendType.SDPA

    return select_on_cpu


def _place_on_cpu(place: Callable[[Any], None]) -> Callable[[Any], None]:
    """Replace the move of weights to a GPU by a check that they need none."""

    @wraps(place)
    def place_pipeline_components(loader: Any) -> None:
        config = loader.model.config
        formats = ("use_fp4_gemms", "use_fp6_gemms", "use_fp8_gemms", "use_fp8_text_encoder", "use_int8_gemms")
        for flag in formats:
            if getattr(config, flag, False):
                raise ValueError(f"{flag}=True needs an accelerator; this machine has none")

    return place_pipeline_components


_DISTRIBUTED = "xfuser.core.distributed"
_MODELS = "xfuser.model_executor.models.runner_models"
_PIPELINES = "xfuser.model_executor.pipelines"

OVERRIDES = (
    Override("xfuser.envs", "get_device_version", _always(None), "raises without an accelerator"),
    Override("xfuser.envs", "get_torch_distributed_backend", _always("gloo"), "raises without an accelerator"),
    Override("xfuser.envs", "_is_cuda", _always(False), "tells how torch was built, not what is present"),
    Override("xfuser.envs", "_is_hip", _always(False), "tells how torch was built, not what is present"),
    Override(
        "xfuser.envs",
        "PACKAGES_CHECKER.packages_info",
        _with_long_context_attention,
        "xfuser makes Ulysses and ring groups only with has_long_ctx_attn",
    ),
    Override(
        f"{_DISTRIBUTED}.runtime_state",
        "RuntimeState._select_attention_backend",
        _sdpa_unless_named,
        "picks cuDNN's attention wherever torch was built with it",
    ),
    Override(f"{_DISTRIBUTED}.group_coordinator", "synchronize", _always(None), "torch.cuda's raises"),
    Override("xfuser.core.utils.timer", "synchronize", _always(None), "torch.cuda's raises"),
    Override("xfuser.model_executor.layers.usp", "PROCESS_GROUP", _yunchang_groups, "None without an accelerator"),
    Override(f"{_DISTRIBUTED}.fp8_comms", "PROCESS_GROUP", _yunchang_groups, "None without an accelerator"),
    Override("xfuser.core.sparge_attention.head_balance", "PROCESS_GROUP", _yunchang_groups, "None without one"),
    Override(f"{_MODELS}.base_model", "torch", _with_cpu_clock, "times with CUDA events"),
    Override("xfuser.runner", "torch", _with_cpu_clock, "waits for a CUDA stream in cleanup"),
    Override(f"{_MODELS}.krea2", "torch", _with_cpu_generators, 'asks for a generator on "cuda"'),
    Override(f"{_PIPELINES}.pipeline_flux", "torch", _with_cpu_generators, 'prepare_run: a generator on "cuda"'),
    Override(
        f"{_PIPELINES}.pipeline_stable_diffusion_3", "torch", _with_cpu_generators, 'prepare_run: a generator on "cuda"'
    ),
    Override(f"{_MODELS}.loading.placement", "place_pipeline_components", _place_on_cpu, 'moves weights to "cuda:N"'),
)
