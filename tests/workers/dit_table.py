"""The table of docs/results/exactness.md from the lines that `dit_exactness.py` prints, given by standard input.

    for N in 2 3 4; do torchrun --standalone --nproc_per_node $N tests/workers/dit_exactness.py --degrees DEGREES \
        --exchange plugin none python "python, none"; done | python tests/workers/dit_table.py
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from otil_xdit.xdit.cpu import enable_cpu_ranks  # noqa: E402

enable_cpu_ranks()

from tests.support.dits import CASES, Case  # noqa: E402

COLUMNS = ("patch 2", "patch 3", "patch 4", "ulysses 2 x patch 2", "cfg 2 x patch 2")
EXACT, NOTHING = ("plugin", "python"), ("none", "python, none")


def main() -> None:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in map(json.loads, filter(lambda text: text.startswith("{"), sys.stdin)):
        found[line["case"]].append(line)
    print("| case | ways | largest latent |", " | ".join(COLUMNS), "| nothing exchanged |")
    print("|---" * (len(COLUMNS) + 4) + "|")
    for name, case in CASES.items():
        lines = found.get(name, [])
        if lines:
            largest = max(line["max_abs_reference"] for line in lines)
            cells = [cell([one for one in lines if one["degrees"] == column], EXACT) for column in COLUMNS]
            print(f"| {name} | {ways(case)} | {largest:.1f} |", " | ".join(cells), f"| {cell(lines, NOTHING)} |")


def ways(case: Case) -> str:
    """How it was run."""
    python = "" if case.wrapper else "Python"
    xdit = f"`{case.wrapper}`" if case.wrapper else f"`{case.runner}`" if case.runner else ""
    return ", ".join(filter(None, (xdit, "the network" if case.network else "", python)))


def cell(lines: list[dict[str, Any]], exchanges: tuple[str, ...]) -> str:
    """The largest error, or why there is none."""
    asked = [line for line in lines if line["exchange"] in exchanges]
    if not asked:
        return "-"
    if any(line["stopped"] for line in asked):
        return "refused" if all("does not support" in (line["stopped"] or "") for line in asked) else "FAILS"
    worst = max if exchanges == EXACT else min
    return f"{worst(line['max_abs_error'] for line in asked):.1e}".replace("0.0e+00", "0")


if __name__ == "__main__":
    main()
