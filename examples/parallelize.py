"""A diffusers pipeline and a torchrun script: one call makes it run on all ranks.

    torchrun --nproc_per_node 2 examples/parallelize.py --output circle.png
    torchrun --nproc_per_node 4 examples/parallelize.py --model /path/to/my-sdxl --cfg

On a machine without GPUs the ranks run on the CPU. Any pipeline round a U-Net will do, or one that xDiT can wrap.
"""

from __future__ import annotations

import argparse
import os

import torch
from diffusers import DiffusionPipeline

import otil_xdit
from otil_xdit.catalog.bundled import model_folder


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=model_folder("tiny-sd"), help="pipeline folder or name on the hub")
    parser.add_argument("--prompt", default="a large red circle on the left, striped background")
    parser.add_argument("--cfg", action="store_true", help="passes with and without the prompt on different ranks")
    parser.add_argument("--output", default="image.png")
    arguments = parser.parse_args()

    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(arguments.model, dtype=torch.float32).to(device)
    pipe = otil_xdit.parallelize(pipe, use_cfg_parallel=arguments.cfg)

    if os.environ["RANK"] == "0":
        print(otil_xdit.summary(pipe))

    generator = torch.Generator(device).manual_seed(0)  # the same on every rank
    output = pipe(arguments.prompt, guidance_scale=4.0, generator=generator)
    if output is not None and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        # A U-Net's pipeline has the image on every rank, a DiT's, as everywhere in xDiT, on the last.
        output.images[0].save(arguments.output)
        report = otil_xdit.report(pipe)
        if report is not None:  # None on one rank
            kilobytes = report.kv_bytes_per_step / 1e3
            print(f"waited {report.waited_seconds:.2f} s, sent {kilobytes:.1f} kB of keys and values a step")
    torch.distributed.destroy_process_group()  # else torch's threads may abort a rank that has done its work


if __name__ == "__main__":
    main()
