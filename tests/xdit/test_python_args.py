"""`xFuserArgs(parallel=...)`, `xFuserModelRunner({"parallel": ...})`, and configs that are sent to other processes."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest

from otil_xdit.errors import FlagError
from otil_xdit.runtime.strategies import get_strategy
from otil_xdit.xdit.plugin.args import carry, choice_of
from otil_xdit.xdit.plugin.register import register

register()

from xfuser import xFuserArgs  # noqa: E402
from xfuser.config.config import ParallelConfig  # noqa: E402

ACTOR = """
import pickle, sys
from otil_xdit.xdit.cpu import enable_cpu_ranks
enable_cpu_ranks()
config = pickle.loads(bytes.fromhex(sys.argv[1]))
import xfuser
from xfuser.model_executor.layers import usp
assert xfuser._otil_xdit_registered and usp.ring_attn.__name__ == "ring_attn" and hasattr(usp.ring_attn, "__wrapped__")
print(config.otil_choice.choice.strategy.name, config.otil_choice.choice.config.ratio)
"""


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")  # without it, importing xfuser.runner would set it for the whole process


def make_runner(config: dict[str, Any]) -> Any:
    from xfuser.runner import xFuserModelRunner

    return xFuserModelRunner(config)


def test_arguments_built_in_python_carry_the_choice() -> None:
    args = xFuserArgs(model="x", parallel="otil", patch_degree=2, otil_ratio=0.5)
    choice = choice_of(args)
    assert choice is not None and choice.strategy is get_strategy("otil") and choice.config.ratio == 0.5
    assert (args.ring_degree, choice.patch_degree) == (2, 2)
    assert choice_of(copy.deepcopy(args)) == choice


def test_the_number_of_patches_follows_from_the_world() -> None:
    choice = choice_of(xFuserArgs(model="x", parallel="sync"))
    assert choice is not None and choice.patch_degree == 2
    args = xFuserArgs(model="x", parallel="hybridiff")
    assert args.use_cfg_parallel and args.ring_degree == 1


def test_without_a_strategy_nothing_is_carried() -> None:
    args = xFuserArgs(model="x", ulysses_degree=2)
    assert choice_of(args) is None and args.ring_degree == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"parallel": "foo"}, "--parallel foo: no such strategy"),
        ({"parallel": "sync", "patch_degree": 3}, "--patch_degree 3 does not fit 2 processes"),
        ({"parallel": "sync", "ring_degree": 1, "patch_degree": 2}, "contradict each other"),
        ({"otil_ratio": 0.5}, "--otil_ratio given without --parallel"),
        ({"parallel": "otil", "otil_ratio": 2.0}, "--otil_ratio is 2; give a number"),
        ({"parallel": "otil", "use_fbcache": True}, "--cache_method fbcache are not supported together"),
    ],
)
def test_what_is_wrong_is_said_at_once(given: dict[str, Any], said: str) -> None:
    with pytest.raises(FlagError, match=said):
        xFuserArgs(model="x", **given)


def test_an_unknown_argument_is_an_error_as_before() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'paralell'"):
        xFuserArgs(model="x", paralell="otil")


def test_outside_of_the_ranks_a_patch_degree_may_be_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE")
    choice = choice_of(xFuserArgs(model="x", parallel="otil", patch_degree=4))
    assert choice is not None and choice.patch_degree == 4
    with pytest.raises(FlagError, match="2 .--ulysses_degree. does not divide them"):
        xFuserArgs(model="x", parallel="otil", ulysses_degree=2)


def test_actors_of_ray_are_counted() -> None:
    args = xFuserArgs(model="x", parallel="otil", use_ray=True, ray_world_size=4)
    choice = choice_of(args)
    assert choice is not None and choice.patch_degree == 4


@pytest.mark.parametrize("given", [{}, {"prompt": "a prompt", "num_inference_steps": 2}])
def test_a_runner_made_from_a_dictionary(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xFuserArgs, "create_config", lambda self: (None, None))  # which makes process groups
    runner = make_runner({"model": "tiny-dit", "parallel": "otil", "patch_degree": 2, **given})
    choice = choice_of(runner.config)
    assert choice is not None and (choice.strategy.name, runner.config.ring_degree) == ("otil", 2)


def test_xdits_runner_starts_no_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FlagError, match="--use_ray are not supported together here"):
        make_runner({"model": "tiny-dit", "parallel": "otil", "use_ray": True, "ray_world_size": 2})


@pytest.mark.slow  # for importing xfuser in another process
def test_a_process_that_a_config_is_sent_to_is_registered() -> None:
    config = object.__new__(ParallelConfig)
    carry(config, choice_of(xFuserArgs(model="x", parallel="otil", otil_ratio=0.25)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", ACTOR, pickle.dumps(config).hex()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "otil 0.25", done.stderr[-2000:]
