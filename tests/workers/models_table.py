"""The table of docs/supported-models.md: every DiT case on every composition, compared with diffusers in one process.

    python tests/workers/models_table.py [--ranks 2 3 4] [--cases "ltx-2"] [--minutes 20]

Runs what docs/results/models.jsonl has no line about, in pieces, and adds a line for each comparison as soon as its
piece is done; so it may be stopped at any time, and goes on where it was. A line that is taken out is measured again.
Then it writes the page's table from these lines.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from otil_xdit.xdit.cpu import enable_cpu_ranks  # noqa: E402

enable_cpu_ranks()

from tests.support.dits import CASES, Case  # noqa: E402

RECORDS = REPOSITORY / "docs" / "results" / "models.jsonl"
PAGE = REPOSITORY / "docs" / "supported-models.md"
BEGIN, END = "<!-- written by tests/workers/models_table.py -->\n", "<!-- to here -->\n"
COLUMNS = {
    "patch 2": "2,1,1",
    "patch 3": "3,1,1",
    "patch 4": "4,1,1",
    "ulysses 2 x patch 2": "2,2,1",
    "cfg 2 x patch 2": "2,1,2",
}
"""Compositions as lines name them, and as `dit_exactness.py` takes them."""
RANKS = {2: ("patch 2",), 3: ("patch 3",), 4: ("patch 4", "ulysses 2 x patch 2", "cfg 2 x patch 2")}
UNEQUAL, NOTHING = "unequal", "none"
KEPT = ("case", "degrees", "exchange", "max_abs_error", "max_abs_reference", "stopped", "date")
PIECE = 6
"""Cases of one torchrun."""


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), choices=list(RANKS))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no piece later than this")
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    for ranks in arguments.ranks:
        for names in pieces(ranks, arguments.cases):
            if time.monotonic() < until:
                measure(ranks, names)
    write()


def pieces(ranks: int, names: list[str]) -> Iterator[list[str]]:
    """Cases about which something is not known yet."""
    known = {(line["case"], line["degrees"], line["exchange"]) for line in records()}
    able = [name for name in names if name != "consisid" or find_spec("cv2")]
    left = [name for name in able if not wanted(name, ranks) <= known]
    for start in range(0, len(left), PIECE):
        yield left[start : start + PIECE]


def wanted(name: str, ranks: int) -> set[tuple[str, str, str]]:
    case = CASES[name]
    degrees = [one for one in RANKS[ranks] if case.cfg or "cfg" not in one]
    exchanges = exchanges_of(case) if ranks == 2 else exchanges_of(case)[:1]
    return {(name, one, exchange) for one in degrees for exchange in exchanges}


def exchanges_of(case: Case) -> tuple[str, ...]:
    """The exact exchange by the way in that xDiT has, the others on two ranks only."""
    return ("python", "python, none", "python, unequal") if case.is_loaded else ("plugin", NOTHING, UNEQUAL)


def measure(ranks: int, names: list[str]) -> None:
    command = ["torchrun", "--standalone", "--nproc_per_node", str(ranks), "tests/workers/dit_exactness.py"]
    command += ["--degrees", *(COLUMNS[one] for one in RANKS[ranks])]
    exchanges = dict.fromkeys(one for name in names for _, _, one in sorted(wanted(name, ranks)))
    done = subprocess.run(
        [*command, "--exchange", *exchanges, "--cases", *names], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found, f"{' '.join(names)} on {ranks} ranks: nothing was measured"
    add({**line, "date": datetime.now(timezone.utc).date().isoformat()} for line in found)


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def add(found: Iterable[dict[str, Any]]) -> None:
    """Keep new lines in the order of the cases."""
    lines = {(line["case"], line["degrees"], line["exchange"]): line for line in [*records(), *found]}
    order = list(CASES)
    kept = sorted(
        (line for line in lines.values() if line["case"] in CASES), key=lambda line: order.index(line["case"])
    )
    RECORDS.write_text("".join(json.dumps({name: line[name] for name in KEPT if name in line}) + "\n" for line in kept))


def write() -> None:
    """Write the page's table."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table(records()) + END + after)


def table(lines: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        found[line["case"]].append(line)
    titles = ("case", "ways", "largest latent", *COLUMNS, "shares 3:2", "nothing exchanged")
    rows = [titles, ("---",) * len(titles)]
    for name, case in CASES.items():
        own = found[name]
        largest = f"{max(line['max_abs_reference'] for line in own):.1f}" if own else ""
        exact = [line for line in own if NOTHING not in line["exchange"] and UNEQUAL not in line["exchange"]]
        cells = [cell([line for line in exact if line["degrees"] == column]) for column in COLUMNS]
        cells = ["-" if "cfg" in column and not case.cfg else one for column, one in zip(COLUMNS, cells, strict=True)]
        unequal = [line for line in own if line["exchange"].endswith(UNEQUAL) and line["degrees"] == "patch 2"]
        nothing = [line for line in own if line["exchange"] in (NOTHING, f"python, {NOTHING}")]
        rows.append((name, ways(case), largest, *cells, cell(unequal), cell(nothing)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def ways(case: Case) -> str:
    """How it can be run."""
    xdit = f"`{case.wrapper or case.runner}`" if case.wrapper or case.runner else ""
    python = "" if case.wrapper else "Python"
    return ", ".join(filter(None, (xdit, "the network" if case.network else "", python)))


def cell(lines: list[dict[str, Any]]) -> str:
    """The largest error, or that it was refused, or empty for what was not measured."""
    if not lines:
        return ""
    if all(line["stopped"] for line in lines):
        by_name = all(any(word in line["stopped"] for word in ("does not support", "not possible")) for line in lines)
        return "refused" if by_name else "FAILS"
    return f"{max(line['max_abs_error'] for line in lines):.1e}".replace("0.0e+00", "0")


if __name__ == "__main__":
    main()
