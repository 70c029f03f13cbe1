"""A diffusers pipeline and a torchrun script: one call makes it run on all ranks.

    torchrun --nproc_per_node 2 examples/parallelize.py --output circle.png

On a machine without GPUs the ranks run on the CPU. Any pipeline that xDiT can wrap will do instead of tiny-dit.
"""

from __future__ import annotations

import argparse
import os

import torch
from diffusers import StableDiffusion3Pipeline

import otil_xdit
from otil_xdit.xdit.models import model_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model_folder("tiny-dit"), help="pipeline folder of SD3's kind")
    parser.add_argument("--prompt", default="a large red circle on the left, striped background")
    parser.add_argument("--output", default="picture.png")
    arguments = parser.parse_args()

    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    pipe = StableDiffusion3Pipeline.from_pretrained(
        arguments.model, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    ).to(device)
    pipe = otil_xdit.parallelize(pipe, otil_xdit.OtilConfig(ratio=1 / 4))

    generator = torch.Generator(device).manual_seed(0)
    output = pipe(arguments.prompt, height=128, width=128, guidance_scale=4.0, generator=generator)
    if output is not None:  # the last rank has the picture, as everywhere in xDiT
        output.images[0].save(arguments.output)


if __name__ == "__main__":
    main()
