"""Compiles xDiT's own wrappers of tiny DiTs, on patches and without a strategy; prints one JSON object each.

    python tests/workers/compiled_dits.py patches|ulysses [CASE ...]

One process is rank 0 of two whose other rank is not there: what it would send is looped back (`tests.support.looped`).
``patches`` runs ``--parallel sync`` on two patches, ``ulysses`` xDiT on two Ulysses ranks without a strategy. Each
object holds the graphs of torch.compile (dynamo's, run as they are), the breaks of graphs by reason, and the largest
difference of the latents from those without compiling.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from otil_xdit.xdit.cpu import enable_cpu_ranks  # noqa: E402

enable_cpu_ranks()

from torch._dynamo.utils import counters  # noqa: E402
from xfuser.core.distributed import init_distributed_environment  # noqa: E402

from otil_xdit.comm.collectives import Collectives  # noqa: E402
from otil_xdit.runtime import session  # noqa: E402
from otil_xdit.xdit.plugin import groups  # noqa: E402
from tests.support.dits import CASES, Case, Degrees, routes  # noqa: E402
from tests.support.dits.exchanges import EXCHANGES  # noqa: E402
from tests.support.in_rank import leave_groups  # noqa: E402
from tests.support.looped import LoopedCollectives  # noqa: E402

HOW = {"patches": (Degrees(patch=2), "plugin"), "ulysses": (Degrees(ulysses=2), "gather")}
SHOWN = ("flux", "flux2", "qwen-image", "z-image")
"""Cases with a runner, whose pipeline is at hand before it is called."""


def main() -> None:
    how, *names = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    stand_alone()
    for name in names or SHOWN:
        with tempfile.TemporaryDirectory() as folder:
            CASES[name].build().save_pretrained(folder)
            print(json.dumps({"case": name, **compared(CASES[name], Path(folder), how)}), flush=True)


def stand_alone() -> None:
    """Be rank 0 of two."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    new_group = dist.new_group

    @wraps(new_group)
    def fake_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **more: Any) -> Any:
        return new_group(ranks, timeout, "fake", **more)

    dist.new_group = dist.distributed_c10d.new_group = fake_group
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    logging.disable(logging.WARNING)
    init_distributed_environment()
    for name in ("_waits_on_host", "_start_gather", "_start_transfers"):
        setattr(Collectives, name, getattr(LoopedCollectives, name))
    groups._make_detector = lambda *_: None
    groups.limit_waits = lambda *_: None
    session.share_random_state = lambda *_: None
    session.facts_of_call = lambda *_: {}


def compared(case: Case, folder: Path, how: str) -> dict[str, Any]:
    plain = latents(case, folder, how)
    torch._dynamo.reset()
    counters.clear()
    init = routes.LatentsOf.__init__

    def compiling(self: Any, pipe: Any, case: Case) -> None:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        init(self, pipe, case)

    routes.LatentsOf.__init__ = compiling
    try:
        made = latents(case, folder, how)
    finally:
        routes.LatentsOf.__init__ = init
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": {reason.strip().partition("\n")[0]: count for reason, count in counters["graph_break"].items()},
        "difference": (made - plain).abs().max().item(),
    }


def latents(case: Case, folder: Path, how: str) -> torch.Tensor:
    degrees, exchange = HOW[how]
    found = routes.run_xdit(case, folder, degrees, EXCHANGES[exchange])
    leave_groups()
    init_distributed_environment()
    assert found is not None, "a runner's pipeline gives latents on every rank"
    return found


if __name__ == "__main__":
    main()
