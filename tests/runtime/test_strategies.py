"""The registry of strategies, and packages that bring their own."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from otil_xdit.method.config import SETTINGS, OtilConfig
from otil_xdit.runtime import strategies as registry
from otil_xdit.runtime.strategies import Strategy, get_strategy, register_strategy, strategies
from otil_xdit.xdit.cpu import enable_cpu_ranks
from otil_xdit.xdit.flags.choice import choose

BUILT_IN = ["otil", "otil-paper", "distrifusion", "compact-1bit", "compact-2bit", "hybridiff", "sync", "naive"]

PLUGIN = """
from otil_xdit.method.config import OtilConfig
from otil_xdit.runtime.strategies import Strategy

def strategy():
    return Strategy("lazy", "refreshes every third step", lambda given: OtilConfig(**{**given, "refresh": 3}))

WRONG_NAME = Strategy("other", "is not what its entry point says", OtilConfig)
"""

ENTRY_POINTS = """
[xfuser.parallel_strategies]
lazy = lazy_plugin:strategy
broken = lazy_plugin:no_such_name
missing = no_such_module:strategy
misnamed = lazy_plugin:WRONG_NAME
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A folder that holds another package as pip would install it."""
    (tmp_path / "lazy_plugin.py").write_text(PLUGIN)
    info = tmp_path / "lazy_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lazy-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return tmp_path


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "REGISTERED", dict(registry.REGISTERED))


def test_another_package_brings_a_strategy(
    plugin: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(plugin)
    assert list(strategies()) == [*BUILT_IN, "lazy"]
    choice = choose({"parallel": "lazy", "otil_ratio": 0.25}, 2)
    assert choice is not None and choice.config == OtilConfig(ratio=0.25, refresh=3)
    with pytest.raises(
        ValueError,
        match="choose from otil, otil-paper, distrifusion, compact-1bit, compact-2bit, hybridiff, sync, naive, lazy",
    ):
        get_strategy("broken")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3, "each broken one is named once"
    for name in ("broken", "missing", "misnamed"):
        assert any(f"parallel strategy {name!r} of " in message for message in said)


def test_the_launcher_knows_another_packages_strategy(plugin: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), str(plugin)])}
    shown = subprocess.run(
        [sys.executable, "-m", "otil_xdit", "--help"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert shown.returncode == 0
    assert "lazy (refreshes every third step)" in " ".join(shown.stdout.split())
    assert "parallel strategy 'broken' of lazy_plugin:no_such_name cannot be loaded" in shown.stderr


def test_register_strategy(own_registry: None) -> None:
    mine = Strategy("mine", "a test", lambda given: OtilConfig(**given))
    assert register_strategy(mine) is register_strategy(mine) is get_strategy("mine")
    other = Strategy("mine", "another test", mine.make_config)
    with pytest.raises(ValueError, match="'mine' is registered already"):
        register_strategy(other)
    assert get_strategy("mine") is mine
    register_strategy(other, replace=True)
    assert get_strategy("mine") is other


def test_built_in_strategies_are_what_pyproject_points_at() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name in BUILT_IN:
        assert f'{name} = "otil_xdit.runtime.strategies:{name.upper().replace("-", "_")}"' in pyproject
        assert getattr(registry, name.upper().replace("-", "_")) is get_strategy(name)


def test_register_twice_changes_nothing() -> None:
    enable_cpu_ranks()
    otil_xdit = importlib.import_module("otil_xdit")
    otil_xdit.register()
    usp = importlib.import_module("xfuser.model_executor.layers.usp")
    arguments = importlib.import_module("xfuser.config").xFuserArgs
    before = (usp.ring_attn, arguments.add_runner_args, arguments.create_config)
    otil_xdit.register()
    get_strategy("otil").install()
    assert (usp.ring_attn, arguments.add_runner_args, arguments.create_config) == before


OTHER_VALUES = {
    "freshness": ("fresh", "displaced"),
    "fresh_share": (0.3,),
    "ratio": (0.3,),
    "codec": ("int4",),
    "coordinates": ("none", "weights"),
    "extrapolation": ("constant",),
    "extrapolation_gain": (0.3,),
    "velocity_damping": (0.3,),
    "block_size": (2,),
    "select": ("random",),
    "score_reference": ("prediction", "previous"),
    "polling": (0.3,),
    "max_age": (50,),
    "warmup_steps": (7,),
    "warmup_codec": ("int4",),
    "refresh": (5,),
    "tolerance": (0.3,),
    "halo": ("fresh", "displaced"),
    "moments": ("fresh", "displaced"),
    "window": ("auto", "3:5"),
    "window_steps": (3,),
    "window_slope": (1e-3,),
    "window_span": (5,),
    "window_cap": (9,),
    "window_guidance": ("none",),
    "kv_cache_dtype": ("float8",),
    "check": (True,),
    "timeout": (7.0,),
    "seed": (7,),
    "quality": ("draft",),
}
"""Values of every setting, at least one of which is not the preset's own."""


@pytest.mark.parametrize("preset", BUILT_IN)
def test_a_setting_has_an_effect_or_is_warned_about(preset: str, caplog: pytest.LogCaptureFixture) -> None:
    assert set(OTHER_VALUES) == {*OtilConfig.__dataclass_fields__, "quality"} - {"requires_cfg_parallel"}, (
        "which is no flag"
    )
    make_config = get_strategy(preset).make_config
    plain = make_config({})
    for setting, values in OTHER_VALUES.items():
        for value in values:
            caplog.clear()
            if getattr(plain, setting, None) == value:
                continue
            changed = make_config({setting: value}) != plain
            said = [record.getMessage() for record in caplog.records]
            assert said == ([] if changed else [f"--otil_{setting} has no effect with --parallel {preset}"]), setting


def test_what_makes_a_preset_may_be_said_again(caplog: pytest.LogCaptureFixture) -> None:
    assert get_strategy("distrifusion").make_config({"freshness": "displaced", "codec": "raw"}) == get_strategy(
        "distrifusion"
    ).make_config({})
    assert not caplog.records


def test_the_table_of_what_has_no_effect_names_what_there_is() -> None:
    for settings, names, _ in registry.NO_EFFECT:
        assert set(settings) <= {*SETTINGS, "quality"} and set(names) < set(BUILT_IN)
    told = [(setting, name) for settings, names, _ in registry.NO_EFFECT for setting in settings for name in names]
    assert len(told) == len(set(told)), "each is told once"
