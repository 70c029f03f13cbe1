"""Whole steps of the exchange with kernels, in Triton's interpreter, beside the same steps without, on real ranks.

The interpreter is chosen when Triton is imported, so the ranks are processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

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


def check(case: str, ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [*command, "tests/workers/fused_exchange.py", case],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert found["case"] == case and len(found["ranks"]) == ranks
    for rank in found["ranks"]:
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
