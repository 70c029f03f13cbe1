"""Random command lines: each reaches the point where something would start, or is refused in one line with exit code 2.

python -m pytest tests/xdit/test_fuzz_flags.py -m slow        # 2,000 of `xfuser`, and 2,000 of `otil-xdit`'s tools
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from otil_xdit.tools import main as tools
from otil_xdit.xdit.launcher import main as cli
from otil_xdit.xdit.launcher.runner_registry import model_registry

ODD = (
    "",
    "0",
    "-1",
    "1/0",
    "0/0",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 30,
    "abc",
    "é%s{}",
    "1_0",
    " 2 ",
    "--",
    "None",
    "-3,2",
    "-1/8",
)
NUMBERS = ("1", "2", "3", "4", "7", "8", "16", "128", "256", "1024", "0.5", "1/8", "0.875", "1e-3")
WORDS = (
    "otil",
    "sync",
    "naive",
    "distrifusion",
    "otil:ratio=1/4,block_size=2",
    "dpm-solver",
    "ddim",
    "own:5",
    "raw",
    "2bit",
)
WORDS = (*WORDS, "kv-l2", "latent-ssim", "fresh", "displaced", "high", "draft", "auto", "float16", "ratio=2", "20MB/s")
WORDS = (*WORDS, "nvlink", "pcie4-x8-host", "12GB/s,20us", "one-process", "ring", "otil:", "otil:=,")
WORDS = (*WORDS, "otil:block_size=zz")
MODELS = (
    "tiny-sd",
    "tiny-dit",
    "tiny-sdxl",
    "SDXL",
    "SD3.5",
    "FLUX",
    "Lumina2",
    "tiny-sdd",
    ".",
    "/",
    "/etc/passwd",
    "",
)
VALUES = (*ODD, *NUMBERS, *WORDS, *MODELS)


class Started(Exception):
    """What stands where work would begin."""


def start(*args: object, **kwargs: object) -> Any:
    raise Started


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """By their long names."""
    actions = {action.option_strings[-1]: action for action in parser._actions if action.option_strings}
    return {flag: action for flag, action in actions.items() if action.dest not in ("help", "version")}


def lines_of(flags: Mapping[str, argparse.Action], likely: Mapping[str, Sequence[str]]) -> st.SearchStrategy[list[str]]:
    """Command lines of some of the flags, in any order, with values that are mostly of their kind."""

    @st.composite
    def argument(draw: st.DrawFn) -> list[str]:
        flag = draw(st.sampled_from(sorted(flags)))
        action = flags[flag]
        shown = flag.replace("_", "-") if draw(st.integers(0, 9)) == 0 else flag
        if action.nargs == 0 and draw(st.integers(0, 9)):
            return [shown]
        known = [*map(str, action.choices or ()), *likely.get(action.dest, ())]
        known = known or list(NUMBERS if action.type in (int, float) else (*NUMBERS, *WORDS))
        value = st.sampled_from(known) if draw(st.integers(0, 4)) else st.sampled_from(VALUES)
        many = 3 if action.nargs in ("+", "*") else 1
        values = draw(st.lists(value, min_size=draw(st.integers(0, 9)) > 0, max_size=many))
        return [f"{shown}={values[0]}"] if len(values) == 1 and draw(st.booleans()) else [shown, *values]

    return st.lists(argument(), max_size=8).map(lambda parts: [word for part in parts for word in part])


def outcome(call: Callable[[], int]) -> tuple[int | None, str]:
    """The exit code, None where work would have begun, and what was said on stderr."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            return call(), errors.getvalue()
    except Started:
        return None, ""
    except SystemExit as ended:
        assert isinstance(ended.code, int), f"no exit code: {ended.code!r}"
        return ended.code, errors.getvalue()


def check(code: int | None, said: str) -> None:
    """Refused lines are one error, with exit code 2; argparse puts its usage before it."""
    if code in (None, 0):
        return
    assert code == 2, f"exit code {code}: {said}"
    lines = said.strip().splitlines()
    assert sum(": error: " in line for line in lines) == 1 and ": error: " in lines[-1], said
    assert "Traceback" not in said and len(lines[-1].partition(": error: ")[2]) > 3


def examples(count: int) -> Callable[[Any], Any]:
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, deadline=None, suppress_health_check=quiet, derandomize=True)


# ---- xfuser --------------------------------------------------------------------------------------------------------

RUNNER_LIKELY = {
    "model": MODELS,
    "parallel": ("otil", "otil-paper", "sync", "naive", "distrifusion", "compact-1bit"),
    "prompt": ("a red circle", "two", ""),
    "height": ("64", "128", "256", "100"),
    "width": ("64", "128", "256", "100"),
    "scheduler": ("ddim", "dpm-solver", "euler"),
    "otil_report": ("report.json", "/no/such/folder/report.json"),
    **{flag: NUMBERS for flag in cli.TORCHRUN_FLAGS},
}


@pytest.fixture
def runner_lines(monkeypatch: pytest.MonkeyPatch) -> st.SearchStrategy[list[str]]:
    """Command lines of `xfuser` on a machine without accelerator and without network, where nothing starts."""
    import huggingface_hub
    from diffusers import DiffusionPipeline

    monkeypatch.setattr(cli, "visible_devices", lambda: 0)
    monkeypatch.setattr(cli, "run_to_end", start)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", start)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", start)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    model_registry()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    import_module("xfuser.config").xFuserArgs.add_runner_args(parser)
    flags = flags_of(parser)
    for name in cli.TORCHRUN_FLAGS:
        flags[f"--{name}"] = argparse.Action([f"--{name}"], name)
    ours = {flag: action for flag, action in flags.items() if "otil" in flag or "degree" in flag}
    named = st.tuples(st.sampled_from(MODELS), st.sampled_from(("otil", "sync", "otil-paper", None)))
    heads = named.map(lambda pair: ["--model", pair[0], "--prompt", "x", *(["--parallel", pair[1]] if pair[1] else [])])
    tails = lines_of(flags, RUNNER_LIKELY) | lines_of(ours, RUNNER_LIKELY)
    return st.tuples(heads | st.just([]), tails).map(lambda parts: parts[0] + parts[1])


def fuzz_runner(lines: st.SearchStrategy[list[str]], count: int) -> dict[int | None, int]:
    """How many of `count` command lines ended how."""
    found: dict[int | None, int] = {}

    @examples(count)
    @given(line=lines)
    def one(line: list[str]) -> None:
        code, said = outcome(lambda: cli.main(line))
        check(code, said)
        found[code] = found.get(code, 0) + 1

    one()
    return found


def test_random_flags_of_the_launcher(runner_lines: st.SearchStrategy[list[str]]) -> None:
    found = fuzz_runner(runner_lines, 150)
    assert found[None] > 5 and found[2] > 50, "both ends are seen"


@pytest.mark.slow
def test_two_thousand_random_flags_of_the_launcher(runner_lines: st.SearchStrategy[list[str]]) -> None:
    found = fuzz_runner(runner_lines, 2000)
    print(f"\n{found[None]} would have started, {found[2]} were refused")
    assert sum(found.values()) >= 2000


# ---- otil-xdit -----------------------------------------------------------------------------------------------------

BEGINS = {
    "eval": ("ImageCache", "ImageMaker"),
    "bench": ("run_plan",),
    "plan": ("options_of", "flops_of"),
    "memory": ("rows_of",),
    "models": ("print_models",),
}
"""Names in each tool's module at which work begins."""
MODULES = {**{tool: f"{tool}.cli" for tool in BEGINS}, "plan": "plan.report"}
"""That module, in `otil_xdit.tools`."""

TOOL_LIKELY = {
    "models": MODELS,
    "model": MODELS,
    "strategies": ("one-process", "sync", "otil", "cfg", "otil:ratio=1/4", "naive"),
    "presets": ("sync", "otil", "otil:ratio=1/4", "naive"),
    "samplers": ("own:5", "ddim:3", "dpm-solver:15"),
    "sampler": ("own", "ddim"),
    "link": ("20MB/s", "ratio=2", "nvlink", "12GB/s,20us"),
    "ranks": ("1", "2", "3", "4"),
    "gpus": ("2", "3", "4", "8"),
    "size": ("64", "128", "256"),
    "sizes": ("64", "128", "256"),
    "latent": ("16", "32", "64"),
    "near": ("sync", "distrifusion", "45"),
    "fit": ("bench.json", "/etc/passwd", "/"),
    "check": ("bench.json", "/etc/passwd", "/"),
    "machine": ("machine.json", "/etc/passwd", "/"),
}


@pytest.fixture
def in_a_folder_where_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench.json").write_text('{"runs": []}')
    (tmp_path / "machine.json").write_text("[]")
    for tool, names in BEGINS.items():
        module = import_module(f"otil_xdit.tools.{MODULES[tool]}")
        for name in names:
            monkeypatch.setattr(module, name, start)
    yield tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "machine.json"], "nothing was written"


def fuzz_tools(count: int) -> dict[str, dict[int | None, int]]:
    """By tool, how many of `count` command lines ended how."""
    found: dict[str, dict[int | None, int]] = {tool: {} for tool in BEGINS}
    lines = {}
    for tool in BEGINS:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        import_module(f"otil_xdit.tools.{tool}.cli").add_arguments(parser)
        flags = flags_of(parser)
        lines[tool] = lines_of(flags, TOOL_LIKELY) if flags else st.lists(st.sampled_from(VALUES), max_size=2)
    heads = {"plan": ["--model", "tiny-sd", "--gpus", "2", "--size", "128"]}

    @examples(count)
    @given(chosen=st.sampled_from(sorted(BEGINS)).flatmap(lambda tool: st.tuples(st.just(tool), lines[tool])))
    def one(chosen: tuple[str, list[str]]) -> None:
        tool, line = chosen
        code, said = outcome(lambda: tools.main([tool, *heads.get(tool, []), *line]))
        check(code, said)
        found[tool][code] = found[tool].get(code, 0) + 1

    one()
    return found


@pytest.mark.usefixtures("cpu_machine", "in_a_folder_where_nothing_starts")
def test_random_flags_of_the_tools() -> None:
    found = fuzz_tools(200)
    assert all(codes.get(None, 0) > 0 and codes.get(2, 0) > 0 for codes in found.values()), found


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_machine", "in_a_folder_where_nothing_starts")
def test_two_thousand_random_flags_of_the_tools() -> None:
    found = fuzz_tools(2000)
    print(
        "\n"
        + "; ".join(
            f"{tool}: {codes.get(None, 0)} would have begun, {codes[2]} refused" for tool, codes in found.items()
        )
    )
    assert sum(sum(codes.values()) for codes in found.values()) >= 2000
