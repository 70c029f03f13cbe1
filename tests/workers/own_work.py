"""What the exchange itself computes in a step on a CPU: one rank's time in its calls, waits left out, by working tree.

python tests/workers/own_work.py [--against FOLDER] [--images 4] [--width 5]

Images are made in turn by this folder's code and by that of FOLDER, another working tree (`git worktree add FOLDER
COMMIT`), so that whatever else the machine does hits both. Time is the calling thread's CPU time: waiting takes none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from otil_xdit.xdit.launcher.processes import CPU_ENVIRONMENT

HERE = Path(__file__).resolve()
CALLS = "gather", "halo", "moments", "norm_halo", "collect", "observe"
STEPS = 14
KINDS = {"waiting": slice(3, 8), "displaced": slice(9, STEPS)}
"""Steps of an image: two are a warm-up, the first of those that wait and of those that do not are like no other."""


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="another working tree to compare with")
    parser.add_argument("--images", type=int, default=4, help="of each")
    parser.add_argument("--width", type=int, default=5, help="times the channels of tiny-sd")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        be_rank(args.width)
        return
    trees = [HERE.parents[2], *([args.against.resolve()] if args.against else [])]
    found: dict[tuple[Path, str], list[float]] = defaultdict(list)
    for _ in range(args.images):
        for tree in trees:
            for kind, steps in image_of(tree, args.width).items():
                found[tree, kind] += steps
    for kind in KINDS:
        for tree in trees:
            steps = found[tree, kind]
            print(f"{kind}: {statistics.median(steps):6.1f} ms a step (least {min(steps):6.1f}) in {tree}")


def image_of(tree: Path, width: int) -> dict[str, list[float]]:
    """Return milliseconds of each step, by its kind, of an image that two ranks of a working tree's code make."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE)]
    env = {**os.environ, **CPU_ENVIRONMENT, "PYTHONPATH": str(tree)}
    said = subprocess.run(
        [*command, "--rank", "--width", str(width)], env=env, check=True, stdout=subprocess.PIPE, text=True, timeout=500
    )
    found: dict[str, list[float]] = json.loads(said.stdout.strip().splitlines()[-1])
    return found


def be_rank(width: int) -> None:
    """Make an image, the second one, as one of two ranks; rank 0 prints what its steps took."""
    import torch
    import torch.distributed as dist

    import otil_xdit
    from otil_xdit import OtilConfig
    from otil_xdit.catalog.bundled import model_folder
    from otil_xdit.exchange.communicator import OtilCommunicator
    from otil_xdit.tools.bench.networks import load

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    pipe = load(str(model_folder("tiny-sd")), "dpm-solver", width)
    pipe.set_progress_bar_config(disable=True)
    took: dict[int, float] = defaultdict(float)

    def timed(name: str) -> None:
        call = getattr(OtilCommunicator, name)

        def wrapped(run: Any, *given: Any, **named: Any) -> Any:
            started = time.thread_time()
            found = call(run, *given, **named)
            took[run.clock.step] += 1e3 * (time.thread_time() - started)
            return found

        setattr(OtilCommunicator, name, wrapped)

    for name in CALLS:
        timed(name)
    otil_xdit.parallelize(pipe, "otil", OtilConfig(fresh_share=0.5))
    size = {"height": 128, "width": 128, "num_inference_steps": STEPS, "output_type": "latent"}
    for _ in range(2):
        took.clear()
        pipe("a large red circle", generator=torch.Generator().manual_seed(0), **size)
    if dist.get_rank() == 0:
        steps = [took[step] for step in range(STEPS)]
        print(json.dumps({kind: steps[part] for kind, part in KINDS.items()}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
