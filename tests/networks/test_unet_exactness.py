"""Fresh exchange gives what the plain U-Net predicts, for every architecture, degree, size and way of calling it.

Each run is one torchrun with many trials (`tests/workers/unet_exactness.py`); a test reads its lines. Slow ones add the
rest of the architectures' combinations and random shapes.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest

from otil_xdit.xdit.cpu import enable_cpu_ranks

enable_cpu_ranks()

from tests.support.dits import Degrees  # noqa: E402
from tests.support.torchrun import lines_of  # noqa: E402
from tests.support.unets import ALTERATIONS, CONFIGS, EXTRAS, Trial  # noqa: E402

TOLERANCE = 1e-4
"""float32, outputs up to 4: the plain networks themselves are up to 2e-5 from float64."""
DOUBLE_TOLERANCE = 1e-5
"""In float64 only the moments of group norms and the time embedding stay in float32."""
DIFFERENCE = 0.05
"""What not exchanging anything after the first step costs at least."""

PATCH, ULYSSES, CFG = Degrees(patch=2), Degrees(ulysses=2), Degrees(cfg=2)
PATCH_3 = Degrees(patch=3)
PATCH_4, WITH_ULYSSES, WITH_CFG = Degrees(patch=4), Degrees(patch=2, ulysses=2), Degrees(patch=2, cfg=2)
ULYSSES_CFG = Degrees(ulysses=2, cfg=2)
DEGREES = (PATCH, ULYSSES, CFG, PATCH_3, PATCH_4, WITH_ULYSSES, WITH_CFG, ULYSSES_CFG)

CASES = tuple(case for case in CONFIGS if case != "resnet sampling")

EXACT = (
    *(Trial(case, PATCH, 40, 24) for case in CASES),
    Trial("sd1.5", PATCH, 33, 32, batch=3),
    Trial("sd1.5", PATCH, 33, 27, batch=2, extra="controlnet"),
    Trial("sdxl", PATCH, 33, 27, batch=2, extra="adapter"),
    Trial("sd2", PATCH, 20, 20, batch=3, extra="text mask"),
    Trial("sd2", PATCH, 20, 20, batch=3, extra="timestep per item"),
    Trial("sd2", PATCH, 20, 20, extra="new text"),
    Trial("sd2", PATCH, 20, 20, extra="text in place"),
    Trial("sd2", ULYSSES, 33, 27),
    Trial("sd1.5", CFG, 20, 20, batch=3),
    Trial("sdxl", CFG, 20, 20, batch=4, extra="timestep per item"),
    Trial("sd1.5", PATCH_3, 20, 20),
    Trial("sd1.5", PATCH_4, 33, 32),
    Trial("sd1.5", WITH_CFG, 40, 24, batch=2, extra="controlnet"),
    Trial("sdxl", WITH_CFG, 33, 32, batch=3),
    Trial("sdxl", WITH_ULYSSES, 40, 24),
)
STALE = (Trial("sd1.5", PATCH, 40, 24, freshness="frozen"), Trial("sdxl", PATCH, 40, 24, freshness="frozen"))
REFUSED = {
    Trial("sd1.5", PATCH_4, 20, 20): "rows",  # 20 rows are 3 at the lowest level
    Trial("sd1.5", WITH_ULYSSES, 20, 20): "rows",
    Trial("sd1.5", Degrees(ulysses=3), 40, 24): "attention heads",
    Trial("resnet sampling", PATCH, 64, 64): "ResnetDownsampleBlock2D",
    Trial("sd1.5", PATCH, 40, 24, extra="fused projections"): "FusedAttnProcessor2_0",
}
"""And what the message names."""


def slow_trials() -> tuple[Trial, ...]:
    """Every architecture on all degrees, every way of calling or changing it, and random shapes."""
    shapes = [(64, 64), (40, 24), (33, 32), (32, 27), (36, 52)]
    found = []
    for number, (case, degrees) in enumerate((case, degrees) for case in CASES for degrees in DEGREES):
        found.append(Trial(case, degrees, *shapes[number % len(shapes)], batch=1 + number % 3))
    for case in ("sd1.5", "sdxl"):
        for degrees in (PATCH, WITH_CFG):
            found += [Trial(case, degrees, 33, 27, batch=2, extra=extra) for extra in EXTRAS]
        served = (extra for extra in ALTERATIONS if extra != "fused projections")
        found += [Trial(case, PATCH, 33, 27, batch=2, extra=extra) for extra in served]
    found += [
        Trial("sdxl", PATCH, 64, 64),
        Trial("sd2", PATCH, 20, 20, extra="timestep as number"),
        Trial("sdxl", CFG, 20, 20, batch=2, extra="controlnet"),
        Trial("refiner", PATCH_3, 33, 32),
        Trial("sd2", WITH_ULYSSES, 33, 27),
    ]
    found += random_trials(60)
    return tuple(trial for trial in dict.fromkeys(found) if trial not in EXACT)


def random_trials(count: int) -> list[Trial]:
    """Random shapes and degrees that the rule about rows allows."""
    chance = random.Random(3)
    found: list[Trial] = []
    while len(found) < count:
        case, degrees = chance.choice(CASES), chance.choice(DEGREES)
        height, width, batch = chance.randint(9, 49), chance.randint(8, 41), chance.randint(1, 4)
        levels = len(CONFIGS[case]["block_out_channels"])
        if -(-height // 2 ** (levels - 1)) >= degrees.patch * degrees.ulysses:
            found.append(Trial(case, degrees, height, width, batch, chance.choice(list(EXTRAS))))
    return found


SLOW = slow_trials()


@cache
def results(world_size: int, slow: bool, /) -> list[dict[str, Any]]:
    """The lines of one torchrun, neighbours ordered so that they share sessions.

    By position only: the cache would take a keyword for another call, and run everything again.
    """
    trials = SLOW if slow else (*EXACT, *STALE, *REFUSED)
    chosen = [trial for trial in trials if trial.degrees.world_size == world_size]
    chosen.sort(key=lambda trial: (trial.case, str(trial.degrees), trial.extra in ALTERATIONS, trial.freshness))
    return lines_of(world_size, "unet_exactness.py", *map(str, chosen), timeout=1500 if slow else 240)


def line_of(trial: Trial, slow: bool) -> dict[str, Any]:
    lines = results(trial.degrees.world_size, slow)
    (line,) = (line for line in lines if line.get("trial") == str(trial))
    return line


def assert_exact(trial: Trial, slow: bool = False) -> None:
    line = line_of(trial, slow)
    assert line["stopped"] is None
    assert line["max_abs_error"] <= (DOUBLE_TOLERANCE if trial.extra == "double" else TOLERANCE), line


@pytest.mark.parametrize("trial", EXACT, ids=str)
def test_fresh_exchange_is_exact(trial: Trial) -> None:
    assert_exact(trial)


@pytest.mark.slow
@pytest.mark.parametrize("trial", SLOW, ids=str)
def test_fresh_exchange_is_exact_everywhere(trial: Trial) -> None:
    assert_exact(trial, slow=True)


@pytest.mark.parametrize("trial", STALE, ids=str)
def test_the_comparison_can_fail(trial: Trial) -> None:
    line = line_of(trial, slow=False)
    assert line["stopped"] is None
    warm_up, *later = line["by_step"]
    assert warm_up <= TOLERANCE, "the first step is synchronous"
    assert min(later) > DIFFERENCE, line


@pytest.mark.parametrize("trial", REFUSED, ids=str)
def test_what_is_refused(trial: Trial) -> None:
    stopped = line_of(trial, False)["stopped"] or "nothing"
    assert stopped.startswith("ValueError") and REFUSED[trial] in stopped


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_detaching_brings_everything_back(world_size: int) -> None:
    restored = [line for line in results(world_size, False) if "restored" in line]
    assert restored
    assert all(line["changed"] == [] for line in restored), restored
