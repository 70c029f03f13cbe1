"""Compares U-Nets that are cut over the ranks of a torchrun with the same networks in one process.

    torchrun --standalone --nproc_per_node 2 tests/workers/unet_exactness.py sd1.5/2,1,1/40x24/1/plain/sync ...

An argument is CASE/PATCH,ULYSSES,CFG/HxW/BATCH/EXTRA/FRESHNESS. Neighbouring trials of the same network and degrees
are generations of one session. Rank 0 prints a JSON line for each: the largest absolute difference on any rank, of all
steps and by step; the largest absolute value of the reference; or why it did not run. A line about each session says
what detaching it did not bring back.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit import OtilConfig  # noqa: E402
from otil_xdit.xdit.plugin.sessions import session_of  # noqa: E402
from tests.support.in_rank import described, leave_groups  # noqa: E402
from tests.support.unets import ALTERATIONS, Trial, build_unet, pipeline_around  # noqa: E402

PATIENCE = 60
"""Seconds that a rank waits for the others before it gives up on all further trials."""


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trials", nargs="+", type=Trial.parse)
    trials: list[Trial] = parser.parse_args().trials
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    enter_xdit()
    for _, group in groupby(trials, key=session_key):
        for line in session_lines(list(group)):
            if dist.get_rank() == 0:
                print(json.dumps(line), flush=True)
    dist.destroy_process_group()


def enter_xdit() -> None:
    """What a script does that has made its process group itself."""
    otil_xdit.register()
    from xfuser.core.distributed import init_distributed_environment

    init_distributed_environment()


def session_key(trial: Trial) -> tuple[Any, ...]:
    """Trials that have this in common can share a session."""
    return trial.case, trial.degrees, trial.freshness, trial.extra if trial.extra in ALTERATIONS else None


def session_lines(trials: list[Trial]) -> Iterator[dict[str, Any]]:
    """What is printed about trials of one network on the same degrees; every rank takes part."""
    first, unet = trials[0], build_unet(trials[0].case)
    before = anatomy(unet)
    pipe, stopped = None, None
    try:
        pipe = parallel(first, unet)
        first.alter(unet)
    except Exception as error:  # what stops a trial is this script's result, and must not stop the next one
        stopped = described(error)
    for trial in trials:
        yield measure(trial, pipe, stopped)
    if pipe is not None:
        session_of(pipe).detach()
        if first.extra not in ALTERATIONS:
            yield {"restored": first.case, "changed": sorted(before ^ anatomy(unet))}
    leave_groups()


def parallel(trial: Trial, unet: UNet2DConditionModel) -> Any:
    config = OtilConfig(freshness=trial.freshness, warmup_steps=1, warmup_codec="raw", timeout=PATIENCE)
    degrees = trial.degrees
    return otil_xdit.parallelize(
        pipeline_around(unet), config=config, ulysses_degree=degrees.ulysses, use_cfg_parallel=degrees.cfg > 1
    )


def anatomy(unet: UNet2DConditionModel) -> set[str]:
    """Everything about the modules that detaching must bring back."""
    return {
        f"{name}: {type(module).__module__}.{type(module).__qualname__} {id(type(module))} {sorted(vars(module))} "
        f"{len(module._forward_hooks)} {len(module._forward_pre_hooks)} {type(getattr(module, 'processor', None))}"
        for name, module in unet.named_modules()
    }


def measure(trial: Trial, pipe: Any, stopped: str | None) -> dict[str, Any]:
    """What rank 0 prints about one trial."""
    start = time.perf_counter()
    outcome: list[float] | str
    reference = expected(trial)
    try:
        outcome = stopped or [difference(*pair) for pair in zip(patched(trial, pipe), reference, strict=True)]
    except Exception as error:
        outcome = described(error)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    errors = [max(step) for step in zip(*(found for found in outcomes if isinstance(found, list)), strict=True)]
    return {
        "trial": str(trial),
        "max_abs_error": max(errors, default=None),
        "by_step": errors,
        "max_abs_reference": max(made.abs().max().item() for made in reference),
        "stopped": next((found for found in outcomes if isinstance(found, str)), None),
        "seconds": round(time.perf_counter() - start, 2),
    }


def expected(trial: Trial) -> list[torch.Tensor]:
    """What the plain network predicts, call by call; computed once, by rank 0."""
    made: list[Any] = [None]
    if dist.get_rank() == 0:
        unet = build_unet(trial.case)
        trial.alter(unet)
        made = [[unet(**arguments)[0] for arguments in trial.calls(unet)]]
    dist.broadcast_object_list(made)
    return made[0]


def patched(trial: Trial, pipe: Any) -> Iterator[torch.Tensor]:
    """What the parallel network predicts, call by call, in one generation."""
    session = session_of(pipe)
    with session.generation(pipe):
        for arguments in trial.calls(pipe.unet):
            yield pipe.unet(**arguments)[0]
            session.communicator.clock.tick()


def difference(made: torch.Tensor, reference: torch.Tensor) -> float:
    if made.shape != reference.shape or made.dtype != reference.dtype:
        raise ValueError(f"{made.dtype} {tuple(made.shape)}; the reference {reference.dtype} {tuple(reference.shape)}")
    return (made - reference).abs().max().item()


if __name__ == "__main__":
    main()
