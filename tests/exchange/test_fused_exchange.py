"""Whole steps of the exchange with kernels, in Triton's interpreter, beside the same steps without, on real ranks.

The interpreter is chosen when Triton is imported, so the ranks are processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

ALONE = (
    "waiting",
    "displaced, checked",
    "refreshed",
    "everything is sent",
    "2 bits",
    "measured",
    "constant gain",
    "previous",
    "raw warm-up",
)
"""Of tests/workers/fused_exchange.py, besides "displaced"."""

ERROR = 1e-5
"""Of the largest number: sums in another order. These numbers have none that fall to the other side of a border."""


def ran(worker: str, case: str, ranks: int) -> list[dict[str, Any]]:
    """Return what every rank found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [*command, f"tests/workers/{worker}.py", case],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert found["case"] == case and len(found["ranks"]) == ranks
    return list(found["ranks"])


def check(case: str, ranks: int) -> None:
    for rank in ran("fused_exchange", case, ranks):
        assert rank["sent"], "kernels send as much"
        assert rank["attended"] < ERROR and rank["copies"] < ERROR, rank


def test_displaced_steps_with_kernels_are_those_without() -> None:
    check("displaced", 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALONE)
def test_steps_with_kernels_are_those_without(case: str) -> None:
    check(case, 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["agreed", "agreed on gains"])
def test_passes_with_kernels_agree_as_those_without(case: str) -> None:
    check(case, 4)


def check_unet(case: str) -> None:
    """All 13 norms of each of 4 steps are activated where they are read, but for those of a block that is hooked."""
    activated = {"hooked": 44, "all hooked": 0}.get(case, 52)
    for rank in ran("fused_unet", case, 2):
        assert rank["error"] < ERROR, rank
        assert rank["without"] == 0 and rank["activated"] == activated, rank


@pytest.mark.parametrize("case", ["displaced", "hooked"])
def test_a_unet_with_kernels_draws_what_it_does_without(case: str) -> None:
    check_unet(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sync", "waiting", "frozen", "channels last", "LoRA", "in between", "all hooked"])
def test_a_unet_with_kernels_draws_what_it_does_without_in_every_way(case: str) -> None:
    check_unet(case)


def check_halos(case: str, ranks: int, is_coded: bool = True) -> None:
    for rank in ran("fused_halos", case, ranks):
        assert rank["sent"] and rank["keeps no more"], rank
        assert rank["roundings"] <= 2, rank
        assert (rank["coding"] > 1e-3) == is_coded, "rows were coded"


def test_halo_rows_with_kernels_are_those_without() -> None:
    check_halos("displaced", 3)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["refreshed", "as they were", "not coded"])
def test_halo_rows_with_kernels_are_those_without_in_every_way(case: str) -> None:
    check_halos(case, 2, is_coded=case != "not coded")
