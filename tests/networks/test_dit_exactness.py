"""Fresh exchange between patches gives the latents of diffusers in one process, for every DiT that xDiT runs.

Each run is one torchrun with many cases (`tests/workers/dit_exactness.py`); a test reads its lines.
`docs/supported-models.md` has the numbers.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest

from otil_xdit.xdit.cpu import enable_cpu_ranks

enable_cpu_ranks()

from tests.support.dits import CASES, Degrees  # noqa: E402
from tests.support.torchrun import lines_of  # noqa: E402

TOLERANCE = 5e-5
"""float32: the ranks add in another order, and three guided steps amplify it to 2e-5 at most."""
DIFFERENCE = 0.1
"""What an exchange that does nothing costs at least; the smallest seen is 0.2."""
CONTROL = 0.05
"""The same of whole pipelines."""

STOPPED = {"sana": "does not support SanaTransformer2DModel"}
"""What xDiT 0.7.0 itself cannot run with patches."""
REFUSED = {"latte": "does not support LatteTransformer3DModel"}
"""What xDiT 0.7.0 gets wrong with patches, whatever exchanges them, and the plugin refuses."""
TELLING = (
    "sd3",
    "sd3, 8 text tokens",
    "sd3, 7 rows",
    "pixart-sigma",
    "hunyuandit",
    "flux",
    "flux, 7 text tokens",
    "qwen-image, 7 text tokens",
    "qwen-image, prompts of 7 and 4 tokens",
    "z-image, prompts of 40 and 8 tokens",
    "krea2, 7 text tokens",
    "wan, 27 tokens",
    "ltx-2, 27 tokens",
    "cosmos3, 27 tokens",
    "hunyuan-video, 7 text tokens",
    "hunyuan-video, 27 tokens",
    "cogvideox, 3 rows and 7 text tokens",
)
"""One of each way to cut a sequence: rows, packed tokens, frames; text in it, in front, in the rear, joined, absent,
copied; padding; masks."""
WITHOUT_PLUGIN = ("latte, spatial only",)
"""What is exact once xDiT lets it run with patches; the plugin does not take it on."""
WRAPPED_IN_ROWS = ("flux, 49 tokens and 7",)
"""What Python's call refuses, as xDiT's wrapper of FLUX.1's pipeline shares rows out; the command line takes it."""
LOADED = tuple(name for name, case in CASES.items() if case.is_loaded and (name != "consisid" or find_spec("cv2")))
"""What Python's call alone can run; diffusers and xDiT have no ConsisID without cv2."""
OTHERS = tuple(
    name
    for name, case in CASES.items()
    if not case.is_loaded and name not in {*STOPPED, *REFUSED, *TELLING, *WITHOUT_PLUGIN}
)
TWO_RANKS = (Degrees(patch=2),)
THREE_RANKS = (Degrees(patch=3),)
FOUR_RANKS = (Degrees(patch=4), Degrees(patch=2, ulysses=2), Degrees(patch=2, cfg=2))


@cache
def results(compositions: tuple[Degrees, ...], cases: tuple[str, ...], exchanges: tuple[str, ...]) -> list[dict]:
    """The lines of one torchrun."""
    chosen = [f"{degrees.patch},{degrees.ulysses},{degrees.cfg}" for degrees in compositions]
    arguments = ["--cases", *cases, "--exchange", *exchanges, "--degrees", *chosen]
    return lines_of(compositions[0].world_size, "dit_exactness.py", *arguments)


def line_of(case: str, degrees: Degrees, exchange: str) -> dict[str, Any]:
    """The line about one case, from the run that it is in."""
    if case in LOADED:
        group = next(group for group in (TWO_RANKS, THREE_RANKS, FOUR_RANKS) if degrees in group)
        lines = results(group, LOADED, ("python", "python, none") if group == TWO_RANKS else ("python",))
    elif exchange == "gather":
        lines = results(TWO_RANKS, (*REFUSED, *WITHOUT_PLUGIN), ("gather",))
    elif degrees in TWO_RANKS:
        cases = OTHERS if case in OTHERS else (*TELLING, *REFUSED, *STOPPED)
        lines = results(TWO_RANKS, cases, ("plugin", "none", "python"))
    elif degrees in THREE_RANKS:
        cases = OTHERS if case in OTHERS else TELLING
        lines = results(THREE_RANKS, cases, ("plugin",))
    else:
        lines = results(FOUR_RANKS, OTHERS if case in OTHERS else TELLING, ("plugin", "python"))
    wanted = {"case": case, "degrees": str(degrees), "exchange": exchange}
    (line,) = (line for line in lines if wanted.items() <= line.items())
    return line


def with_slow_others() -> list[Any]:
    return [*TELLING, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


def assert_exact(line: dict[str, Any]) -> None:
    assert line["stopped"] is None
    assert line["ranks_with_latents"], "no rank has the latents"
    assert line["max_abs_error"] <= TOLERANCE, line


@pytest.mark.parametrize(
    "degrees",
    (*TWO_RANKS, *(pytest.param(more, marks=pytest.mark.slow) for more in (*THREE_RANKS, *FOUR_RANKS))),
    ids=str,
)
@pytest.mark.parametrize("case", with_slow_others())
def test_fresh_exchange_is_exact(case: str, degrees: Degrees) -> None:
    if degrees.cfg > 1 and not CASES[case].cfg:
        pytest.skip("xDiT has no CFG parallelism for it")
    assert_exact(line_of(case, degrees, "plugin"))


@pytest.mark.parametrize(
    "degrees", (*TWO_RANKS, *(pytest.param(more, marks=pytest.mark.slow) for more in FOUR_RANKS)), ids=str
)
@pytest.mark.parametrize("case", with_slow_others())
def test_a_pipeline_that_is_parallelized_is_exact_and_comes_back(case: str, degrees: Degrees) -> None:
    if CASES[case].wrapper is not None:
        pytest.skip("xDiT wraps it, as its other tests do")
    if degrees.cfg > 1 and not CASES[case].cfg:
        pytest.skip("xDiT has no CFG parallelism for it")
    if case in WRAPPED_IN_ROWS:
        assert "shares 7 rows of tokens among" in (line_of(case, degrees, "python")["stopped"] or "nothing")
        return
    assert_exact(line_of(case, degrees, "python"))


@pytest.mark.slow
@pytest.mark.parametrize("degrees", (*TWO_RANKS, *THREE_RANKS, *FOUR_RANKS), ids=str)
@pytest.mark.parametrize("case", LOADED)
def test_a_pipeline_that_only_python_runs_is_exact(case: str, degrees: Degrees) -> None:
    if degrees.cfg > 1 and not CASES[case].cfg:
        pytest.skip("xDiT has no CFG parallelism for it")
    assert_exact(line_of(case, degrees, "python"))


@pytest.mark.slow
@pytest.mark.parametrize("case", LOADED)
def test_its_comparison_can_fail(case: str) -> None:
    line = line_of(case, Degrees(patch=2), "python, none")
    assert line["stopped"] is None and line["max_abs_error"] > CONTROL, line


@pytest.mark.parametrize("case", with_slow_others())
def test_the_comparison_can_fail(case: str) -> None:
    line = line_of(case, Degrees(patch=2), "none")
    assert line["stopped"] is None
    assert line["max_abs_error"] > DIFFERENCE, line


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_plugin_refuses(case: str) -> None:
    assert REFUSED[case] in (line_of(case, Degrees(patch=2), "plugin")["stopped"] or "nothing")


@pytest.mark.parametrize("case", STOPPED)
def test_what_xdit_cannot_run(case: str) -> None:
    line = line_of(case, Degrees(patch=2), "plugin")
    assert line["stopped"] is not None, f"{case} runs now: say so here and in docs/supported-models.md"
    assert STOPPED[case] in line["stopped"]


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_would_be_wrong(case: str) -> None:
    line = line_of(case, Degrees(patch=2), "gather")
    assert line["stopped"] is None
    assert line["max_abs_error"] > 10 * TOLERANCE, line


@pytest.mark.slow
@pytest.mark.parametrize("case", WITHOUT_PLUGIN)
def test_what_gathered_keys_would_make_exact(case: str) -> None:
    assert_exact(line_of(case, Degrees(patch=2), "gather"))
