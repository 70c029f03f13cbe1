"""Time of a VAE's decode on the ranks of a torchrun, shared and by each rank alone, in turn.

    torchrun --standalone --nproc_per_node 2 tests/workers/vae_time.py [--size 512] [--rounds 5]

SDXL's VAE with a quarter of its channels and random weights. Rank 0 prints one JSON object: seconds of each (the median
of the rounds), and their ratio in each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from otil_xdit.comm.collectives import Collectives  # noqa: E402
from otil_xdit.comm.groups import PatchGroup  # noqa: E402
from otil_xdit.exchange.synchronous import SynchronousExchange  # noqa: E402
from otil_xdit.networks.vae.coder import PatchedCoder  # noqa: E402

WAYS = {"alone": False, "shared": True}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**blocks, block_out_channels=(32, 64, 128, 128), layers_per_block=2, norm_num_groups=8).eval()
    way = [""]
    group = PatchGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    exchange = SynchronousExchange(Collectives(group, 60), "vae")
    PatchedCoder(vae.decoder, exchange, lambda: WAYS[way[0]]).prepare()
    latent = torch.randn(1, 4, arguments.size // 8, arguments.size // 8)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(arguments.rounds + 1):
        for name in WAYS:
            way[0] = name
            dist.barrier()
            start = time.perf_counter()
            vae.decode(latent)
            dist.barrier()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        medians = {name: round(statistics.median(spent), 4) for name, spent in seconds.items()}
        ratios = [round(alone / shared, 3) for alone, shared in zip(*seconds.values(), strict=True)]
        print(json.dumps({"size": arguments.size, **medians, "ratios": ratios}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
