"""diffusers' pipelines as judge: each scene on one process and on the ranks of this torchrun, in sync, compared.

    torchrun --standalone --nproc_per_node 2 tests/workers/unet_scenes.py [--scenes "LoRA before" SDXL] [--cfg]

Rank 0 prints a line of JSON for each scene and a Markdown table at the end. The exit code is 1 if any result differs
by more than its tolerance, or something was not refused that must be.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit import OtilConfig  # noqa: E402
from otil_xdit.xdit.flags.options import parse_shares  # noqa: E402
from otil_xdit.xdit.plugin.sessions import session_of  # noqa: E402
from tests.support.in_rank import described, leave_groups  # noqa: E402
from tests.support.unet_scenes import SCENES, Scene  # noqa: E402
from tests.workers.unet_exactness import PATIENCE, enter_xdit  # noqa: E402


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    enter_xdit()
    lines = []
    for scene in (SCENES[name] for name in arguments.scenes):
        lines.append(judge(scene, arguments))
        leave_groups()
        if dist.get_rank() == 0:
            print(json.dumps(lines[-1]), flush=True)
    if dist.get_rank() == 0:
        print(table(lines), flush=True)
    dist.destroy_process_group()
    return 0 if all(line["passed"] for line in lines) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", nargs="+", default=list(SCENES), choices=list(SCENES), metavar="SCENE")
    parser.add_argument("--cfg", action="store_true", help="halve the batch over two groups of ranks")
    parser.add_argument("--ulysses", type=int, default=1, help="ranks that share attention heads")
    parser.add_argument("--shares", type=parse_shares, default=(), help="of the patches' rows, such as 2,1")
    return parser.parse_args()


def judge(scene: Scene, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is printed about one scene; every rank takes part."""
    start = time.perf_counter()
    reference = None if scene.refused else expected(scene)
    outcome: list[float] | str
    try:
        made = parallel(scene, arguments)
        outcome = [] if reference is None else [difference(*pair) for pair in zip(made, reference, strict=True)]
    except Exception as error:  # whatever stops a scene is this script's result
        outcome = described(error)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    stopped = [found for found in outcomes if isinstance(found, str)]
    errors = [max(found, default=0.0) for found in outcomes if isinstance(found, list)]
    line = {
        "scene": scene.name,
        "max_abs_error": max(errors, default=None),
        "max_abs_reference": None if reference is None else max(one.abs().max().item() for one in reference),
        "stopped": stopped[0] if stopped else None,
        "seconds": round(time.perf_counter() - start, 2),
    }
    if scene.refused:
        told = [text for text in stopped if text.startswith("ValueError") and scene.refused in text]
        return {**line, "passed": len(told) == len(outcomes)}
    return {**line, "passed": not stopped and max(errors) <= scene.tolerance}


def expected(scene: Scene) -> list[torch.Tensor]:
    """What plain diffusers gives, on rank 0."""
    made: list[Any] = [None]
    if dist.get_rank() == 0:
        made = [scene.run(scene.build())]
    dist.broadcast_object_list(made)
    return made[0]


def parallel(scene: Scene, arguments: argparse.Namespace) -> list[torch.Tensor]:
    """What the ranks of this torchrun give together."""
    degrees = {"ulysses_degree": arguments.ulysses, "use_cfg_parallel": arguments.cfg, "patch_shares": arguments.shares}
    pipe = otil_xdit.parallelize(scene.build(), config=OtilConfig(freshness="sync", timeout=PATIENCE), **degrees)
    try:
        return scene.run(pipe)
    finally:
        session_of(pipe).detach()


def difference(made: torch.Tensor, reference: torch.Tensor) -> float:
    if made.shape != reference.shape:
        raise ValueError(f"the result is {tuple(made.shape)}, the reference {tuple(reference.shape)}")
    return (made - reference).abs().max().item()


def table(lines: list[dict[str, Any]]) -> str:
    rows = ["| scene | max. difference | largest value | |", "|---|---|---|---|"]
    for line in lines:
        error = "" if line["max_abs_error"] is None else f"{line['max_abs_error']:.1e}"
        largest = "" if line["max_abs_reference"] is None else f"{line['max_abs_reference']:.1f}"
        verdict = ("refused" if line["stopped"] else "ok") if line["passed"] else f"FAILED {line['stopped'] or ''}"
        rows.append(f"| {line['scene']} | {error} | {largest} | {verdict} |")
    return "\n".join(rows)


if __name__ == "__main__":
    raise SystemExit(main())
