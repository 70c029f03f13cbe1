"""xDiT's own tests without the plugin and with it: prints what differs, and a table.

    pip download --no-deps --no-binary :all: URL-OF-THE-SDIST && tar xzf xfuser-0.7.0.tar.gz
    python tests/workers/xdit_tests.py xfuser-0.7.0/tests [--only core]

xDiT cannot be imported without an accelerator; "without the plugin" has `otil_xdit.xdit.cpu` there, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

PATIENCE = 1400
PREPARE = {
    "without": "from otil_xdit.xdit.cpu import enable_cpu_ranks\nenable_cpu_ranks()\n",
    "with": "import otil_xdit\notil_xdit.register()\n",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("tests", type=Path, help="The folder with xDiT's tests.")
    parser.add_argument("--only", nargs="*", default=["."], help="Files or folders in there.")
    arguments = parser.parse_args()
    outcomes = {name: run(arguments.tests, arguments.only, code) for name, code in PREPARE.items()}
    every = sorted(set(outcomes["without"]) | set(outcomes["with"]))
    for test in every:
        found = {name: outcome.get(test, "absent") for name, outcome in outcomes.items()}
        if found["with"] != found["without"]:
            print(f"differs: {test}: {found['without']} without, {found['with']} with")
    print("\n| xDiT's tests | passed | skipped | failed | errors |\n|---|---|---|---|---|")
    for name, outcome in outcomes.items():
        counts = Counter(outcome.values())
        print(f"| {name} the plugin |", " | ".join(str(counts[kind]) for kind in KINDS), "|")


KINDS = ("passed", "skipped", "failure", "error")


def run(tests: Path, only: list[str], prepare: str) -> dict[str, str]:
    """What became of each test, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "prepare_xfuser.py").write_text(prepare)
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "prepare_xfuser", "-p", "no:cacheprovider"]
        paths = os.pathsep.join((folder, str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")))
        subprocess.run(
            [*command, "--continue-on-collection-errors", f"--junitxml={report}", *only],
            cwd=tests,
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE,
        )
        cases = ElementTree.parse(report).iter("testcase")
        return {f"{case.get('classname')}.{case.get('name')}": outcome_of(case) for case in cases}


def outcome_of(case: ElementTree.Element) -> str:
    return next((kind for kind in KINDS[1:] if case.find(kind) is not None), "passed")


if __name__ == "__main__":
    main()
