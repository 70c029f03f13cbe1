"""The table of U-Nets' exactness in docs/results/exactness.md, and what it is made of.

    for N in 2 3 4; do python tests/workers/unet_table.py $N | xargs -d '\\n' torchrun --standalone \\
        --nproc_per_node $N tests/workers/unet_exactness.py; done | python tests/workers/unet_table.py

With a number it prints the trials on as many ranks, which `tests/networks/test_unet_exactness.py` has; without one it
reads the lines about them and prints the table.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    if len(sys.argv) > 1:
        from tests.networks.test_unet_exactness import EXACT

        print("\n".join(str(trial) for trial in EXACT if trial.degrees.world_size == int(sys.argv[1])))
        return
    errors: dict[str, list[float]] = defaultdict(list)
    lines = [json.loads(line) for line in sys.stdin if line.startswith("{")]
    for line in lines:
        if "trial" in line:
            assert line["stopped"] is None, line
            errors[line["trial"].partition("/")[0]].append(line["max_abs_error"])
    print("| | trials | max abs error |\n|---|---|---|")
    for name, found in errors.items():
        print(f"| {name} | {len(found)} | {max(found):.1e} |")


if __name__ == "__main__":
    main()
