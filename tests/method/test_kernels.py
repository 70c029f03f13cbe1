"""The fused kernels against the eager code, in Triton's interpreter, and compiled for the cards that they are for.

The interpreter is chosen when a kernel is defined, so it is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

KERNELS = ("moments", "own", "chosen", "copies", "gathered", "payloads", "group_norm", "rows", "vectors")


def worker(script: str, *arguments: str, **environment: str) -> list[dict[str, Any]]:
    command = [sys.executable, f"tests/workers/{script}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_kernels_compute_what_the_eager_code_does() -> None:
    found = worker("fused_kernels", *KERNELS, TRITON_INTERPRET="1")
    assert {case["kernel"] for case in found} == set(KERNELS)
    assert [case for case in found if not case["error"] <= case["bound"]] == []


def check_compiled(*cards: str) -> None:
    """No kernel keeps numbers in local memory, and each fits an SM at two blocks or more of it."""
    found = worker("compiled_kernels", "--cards", *cards)
    assert len({case["kernel"] for case in found}) >= 16
    for case in found:
        print(case)
        assert case["spilled"] == 0 and case["registers"] <= 128 and case["shared"] <= 48 * 1024, case


def test_kernels_compile_for_a_card() -> None:
    check_compiled("86")


@pytest.mark.slow
def test_kernels_compile_for_every_card() -> None:
    check_compiled("80", "86", "89", "90", "120")
