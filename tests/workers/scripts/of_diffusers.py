"""A script for one process, as its users write them: nothing in it knows of ranks, but for what it prints at the end.

python -m otil_xdit.run --parallel sync --patch_degree 2 tests/workers/scripts/of_diffusers.py
"""

import json
import os

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline

import otil_xdit
from otil_xdit.catalog.bundled import absent_parts, model_folder

PROMPT = "a large red circle on the left, striped background"
CALL = {"num_inference_steps": 4, "guidance_scale": 4.0}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


unet = DiffusionPipeline.from_pretrained(model_folder("tiny-sd"), torch_dtype=torch.float32)
dit_folder = model_folder("tiny-dit")
dit = DiffusionPipeline.from_pretrained(dit_folder, torch_dtype=torch.float32, **absent_parts(dit_folder))
edit = StableDiffusionImg2ImgPipeline.from_pipe(unet)
images = {
    "tiny-sd": unet(PROMPT, generator=seeded(), **CALL).images[0],
    "tiny-dit": dit(PROMPT, generator=seeded(), **CALL).images[0],
    "tiny-sd, again": unet(PROMPT, generator=seeded(), **CALL).images[0],
}
images["tiny-sd, image to image"] = edit(
    PROMPT, image=images["tiny-sd"], strength=0.9, generator=seeded(), **CALL
).images[0]


def sent(pipe: DiffusionPipeline) -> float:
    found = otil_xdit.report(vars(pipe).get("_otil_made", pipe))
    return 0 if found is None else sum(sum(phases.values()) for phases in found.sent_bytes.values())


line = {
    "rank": int(os.environ.get("RANK", "0")),
    "images": {name: list(image.convert("L").tobytes()) for name, image in images.items()},
    "sent": {name: sent(dit if "dit" in name else edit if "to image" in name else unet) for name in images},
}
for rank in range(int(os.environ.get("WORLD_SIZE", "1"))):  # in turns: such long lines would be mixed up
    if rank == line["rank"]:
        print(json.dumps(line), flush=True)
    if dist.is_initialized():
        dist.barrier()
