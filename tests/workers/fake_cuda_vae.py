"""A VAE on fake CUDA tensors, one rank after the other, in one process; prints one JSON object.

    python tests/workers/fake_cuda_vae.py

Launches of a decode and of an encode on one card and of each of two ranks, what waits for the device, and what reads
or writes the host's memory, by place in the package.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.fake_cuda.machine import DEVICE, become_cuda_machine, join  # noqa: E402

become_cuda_machine(2)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from otil_xdit.comm.collectives import Collectives  # noqa: E402
from otil_xdit.comm.groups import PatchGroup  # noqa: E402
from otil_xdit.exchange.synchronous import SynchronousExchange  # noqa: E402
from otil_xdit.networks.vae.coder import PatchedCoder  # noqa: E402
from tests.networks.test_vae import build  # noqa: E402
from tests.support.fake_cuda.launches import LaunchCounter, Launches  # noqa: E402
from tests.support.fake_cuda.rank import FAKE, put_on_device  # noqa: E402

RANKS = 2
ROWS = 9
"""Of the latent: more on one rank than on the other."""


def main() -> None:
    found: dict[str, Any] = {"one card": counted(lambda coder: None)}
    for rank in range(RANKS):
        join(rank, RANKS)
        group = PatchGroup(dist.group.WORLD, rank, RANKS)
        exchange = SynchronousExchange(Collectives(group, 20), "vae")
        found[f"rank {rank}"] = counted(lambda coder, exchange=exchange: PatchedCoder(coder, exchange, yes).prepare())
        dist.destroy_process_group()
    print(json.dumps(found))


def yes() -> bool:
    return True


def counted(prepare: Callable[[Any], object]) -> dict[str, Any]:
    vae = build()
    put_on_device(SimpleNamespace(components={"vae": vae}), torch.float16)
    made = {}
    for name, coder, shape in (
        ("decoder", vae.decoder, (1, 4, ROWS, 6)),
        ("encoder", vae.encoder, (1, 3, 4 * ROWS, 24)),
    ):
        prepare(coder)
        counter = LaunchCounter()
        with FAKE, torch.no_grad(), counter.watching_messages():
            x = torch.empty(shape, dtype=torch.float16, device=DEVICE)
            with counter:
                out = coder(x)
        made[name] = {**described(counter.take()), "shape": list(out.shape), "device": out.device.type}
    return made


def described(launches: Launches) -> dict[str, Any]:
    host = {f"{what} at {site}": count for (what, site), count in launches.host.items()}
    return {"launches": launches.total, "host": host, "messages": dict(launches.messages)}


if __name__ == "__main__":
    main()
