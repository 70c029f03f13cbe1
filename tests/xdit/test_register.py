"""The table of hooks: what it names is hooked, by the file that it names, and nothing else is."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from otil_xdit.xdit.plugin import register

ROW = re.compile(r"^\| (?P<what>.+) \| .+ \| `(?P<file>\w+)` \|$", re.MULTILINE)

HOOKED: dict[str, tuple[str, str]] = {
    "`xFuserArgs.add_runner_args`": ("xfuser.config.args", "xFuserArgs.add_runner_args"),
    "`xFuserArgs.__init__`": ("xfuser.config.args", "xFuserArgs.__init__"),
    "`xFuserArgs.from_runner_args`": ("xfuser.config.args", "xFuserArgs.from_runner_args"),
    "`xFuserArgs.create_config`": ("xfuser.config.args", "xFuserArgs.create_config"),
    "`runtime_state.initialize_runtime_state`": ("xfuser.core.distributed.runtime_state", "initialize_runtime_state"),
    "`RuntimeState`": (
        "xfuser.core.distributed.runtime_state",
        "RuntimeState._check_if_backend_compatible_with_current_configuration",
    ),
    "`RuntimeState._select_attention_backend`": (
        "xfuser.core.distributed.runtime_state",
        "RuntimeState._select_attention_backend",
    ),
    "`xFuserPipelineBaseWrapper.__init__`": (
        "xfuser.model_executor.pipelines.base_pipeline",
        "xFuserPipelineBaseWrapper.__init__",
    ),
    "`usp.ring_attn`": ("xfuser.model_executor.layers.usp", "ring_attn"),
    "`usp._get_attention_function`": ("xfuser.model_executor.layers.usp", "_get_attention_function"),
    "`usp._trim_trailing_kv_padding`": ("xfuser.model_executor.layers.usp", "_trim_trailing_kv_padding"),
    "`DiTRuntimeState._calc": (
        "xfuser.core.distributed.runtime_state",
        "DiTRuntimeState._calc_patches_metadata",
    ),
    "`xFuserPipelineBaseWrapper._init_sync": (
        "xfuser.model_executor.pipelines.base_pipeline",
        "xFuserPipelineBaseWrapper._init_sync_pipeline",
    ),
    "`xFuserPatchEmbedWrapper.forward`": (
        "xfuser.model_executor.layers.embeddings",
        "xFuserPatchEmbedWrapper.forward",
    ),
    "`xFuserModel._validate_config`": (
        "xfuser.model_executor.models.runner_models.base_model",
        "xFuserModel._validate_config",
    ),
    "`xFuserModel`'s last step": (
        "xfuser.model_executor.models.runner_models.base_model",
        "xFuserModel._post_load_and_state_initialization",
    ),
    "`GroupCoordinator.all_gather`": ("xfuser.core.distributed.group_coordinator", "GroupCoordinator.all_gather"),
    "`xFuserFlowMatchEulerDiscreteSchedulerWrapper.step`": (
        "xfuser.model_executor.schedulers.scheduling_flow_match_euler_discrete",
        "xFuserFlowMatchEulerDiscreteSchedulerWrapper.step",
    ),
}
"""Where the name that a row begins with is found."""


def makers(function: Any) -> set[str]:
    """The files of this package in which a function, and what it wraps, were written."""
    found = set()
    while function is not None:
        plain = getattr(function, "_torchdynamo_orig_callable", function)  # what torch.compiler.disable has wrapped
        path = Path(getattr(plain, "__func__", plain).__code__.co_filename)
        if path.parent.name == "plugin":
            found.add(path.stem)
        function = getattr(function, "__wrapped__", None)
    return found


def rows() -> dict[str, str]:
    """The file that hooks it, by the beginning of a row."""
    return {row["what"]: row["file"] for row in ROW.finditer(str(register.__doc__)) if row["file"] != "hooked"}


@pytest.mark.parametrize(("begin", "place"), HOOKED.items(), ids=[name for _, name in HOOKED.values()])
def test_a_row_of_the_table_is_true(begin: str, place: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    register.register()
    module, path = place
    hooked: Any = importlib.import_module(module)
    for name in path.split("."):
        hooked = getattr(hooked, name)
    (file,) = [file for what, file in rows().items() if what.startswith(begin)]
    assert makers(hooked) == {file}


def test_the_table_has_a_row_for_each() -> None:
    assert len(rows()) == len(HOOKED)


def test_registering_twice_hooks_once() -> None:
    register.register()
    usp = importlib.import_module("xfuser.model_executor.layers.usp")
    before = usp.ring_attn
    register.register()
    assert usp.ring_attn is before
