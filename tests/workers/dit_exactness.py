"""Runs cases of the zoo on the ranks of a torchrun and compares them with diffusers in one process.

    torchrun --standalone --nproc_per_node 2 tests/workers/dit_exactness.py --degrees 2,1,1 [--cases sd3] [--exchange
    plugin none python]

Prints one JSON line per case and composition: what ran, the largest absolute difference of the final latents on the
ranks that have them, the largest absolute value of the reference, or why it did not run.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from otil_xdit.xdit.cpu import enable_cpu_ranks  # noqa: E402

enable_cpu_ranks()

from xfuser.core.distributed import init_distributed_environment  # noqa: E402

from tests.support.dits import CASES, Case, Degrees  # noqa: E402
from tests.support.dits.exchanges import EXCHANGES  # noqa: E402
from tests.support.dits.routes import run_parallelized, run_plain, run_xdit  # noqa: E402
from tests.support.in_rank import described, leave_groups  # noqa: E402

PYTHON = {
    "python": "plugin",
    "python, none": "none",
    "python, unequal": "unequal",
    "python, unequal, none": "unequal, none",
}
"""`otil_xdit.parallelize` with ``sync``, where the others are ways to exchange under xDiT's command line."""
PATIENCE = timedelta(seconds=60)
"""How long a rank waits for the others before it gives up on all further cases."""


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", timeout=PATIENCE)
    init_distributed_environment()
    with tempfile.TemporaryDirectory() as scratch:
        for case in (CASES[name] for name in arguments.cases):
            folder = Path(scratch) if case.is_loaded else shared_folder(case, Path(scratch))
            reference = run_plain(case)
            for degrees in arguments.degrees:
                for exchange in exchanges_of(case, degrees, arguments.exchange):
                    report(measure(case, folder, reference, degrees, exchange))
        dist.barrier()  # rank 0 removes the folder that the others read
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--degrees", nargs="+", type=degrees, required=True, help="patch,ulysses,cfg")
    parser.add_argument("--exchange", nargs="+", choices=[*EXCHANGES, *PYTHON], default=["gather"])
    return parser.parse_args()


def exchanges_of(case: Case, degrees: Degrees, asked: list[str]) -> list[str]:
    """What can be compared: not every case has CFG parallelism, and what xDiT wraps has other tests of that."""
    if degrees.cfg > 1 and not case.cfg:
        return []
    possible = [*(() if case.is_loaded else EXCHANGES), *(() if case.wrapper else ("python", "python, unequal"))]
    possible += ["python, none", "python, unequal, none"] if case.is_loaded else []
    return [name for name in asked if name in possible]


def degrees(text: str) -> Degrees:
    return Degrees(*map(int, text.split(",")))


def shared_folder(case: Case, scratch: Path) -> Path:
    """Where rank 0 has saved the case's pipeline."""
    folder = [str(scratch / case.name)]
    if dist.get_rank() == 0:
        case.build().save_pretrained(folder[0])
    dist.broadcast_object_list(folder)
    return Path(folder[0])


def measure(case: Case, folder: Path, reference: torch.Tensor, degrees: Degrees, exchange: str) -> dict[str, Any]:
    """What rank 0 prints about one case; every rank takes part."""
    start = time.perf_counter()
    try:
        if exchange in PYTHON:
            latents = run_parallelized(case, degrees, EXCHANGES[PYTHON[exchange]], reference)
        else:
            latents = run_xdit(case, folder, degrees, EXCHANGES[exchange])
        outcome: float | str | None = None if latents is None else difference(latents, reference)
    except Exception as error:  # whatever stops a case is this script's result, and must not stop the next case
        outcome = described(error)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    leave_groups()
    return {
        "case": case.name,
        "degrees": str(degrees),
        "exchange": exchange,
        "max_abs_error": max((found for found in outcomes if isinstance(found, float)), default=None),
        "max_abs_reference": reference.abs().max().item(),
        "ranks_with_latents": [rank for rank, found in enumerate(outcomes) if isinstance(found, float)],
        "stopped": next((found for found in outcomes if isinstance(found, str)), None),
        "seconds": round(time.perf_counter() - start, 2),
    }


def difference(latents: torch.Tensor, reference: torch.Tensor) -> float:
    if latents.shape != reference.shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}, the reference {tuple(reference.shape)}")
    return (latents - reference).abs().max().item()


def report(line: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
