"""`patch_shares="auto"` on the ranks of a torchrun: the shares of equal machines, and of one that is twice as fast.

    torchrun --standalone --nproc_per_node 2 tests/workers/measured_shares.py

Rank 0 prints a JSON line for each: the rows of each patch, and the largest difference from one process under `sync`,
over the largest latent.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit.xdit.plugin import measured_shares  # noqa: E402
from tests.support.in_rank import settle, tell  # noqa: E402
from tests.workers.unet_session import image, pipeline  # noqa: E402


def main() -> None:
    settle()
    alone = image(pipeline(), rows=48)
    plain = measured_shares.step_seconds
    told: list[float] = []

    def measured(pipe: Any) -> float:
        told.append(plain(pipe))
        return 1.0 + dist.get_rank()

    for name, seconds in (("rank 0 is twice as fast", measured), ("equal", lambda pipe: 1.0)):
        with patch.object(measured_shares, "step_seconds", seconds):
            pipe = pipeline()
            pipe.unet.register_to_config(sample_size=16)  # a step of its own size would take seconds
            pipe = otil_xdit.parallelize(pipe, "sync", patch_shares="auto")
        rows: list[int] = []
        hook = pipe.unet.conv_in.register_forward_hook(partial(record, rows))
        error = (image(pipe, rows=48) - alone).abs().max().item() / alone.abs().max().item()
        hook.remove()
        otil_xdit.restore(pipe)
        tell(name, {"rows": rows[0], "error": error, "seconds": told[-1]})
    dist.barrier()
    dist.destroy_process_group()


def record(rows: list[int], module: Any, given: Any, made: torch.Tensor) -> None:
    """Record how many rows a layer of this rank gives."""
    rows.append(made.shape[2])


if __name__ == "__main__":
    main()
