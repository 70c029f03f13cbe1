"""What a pipeline's VAE does on the ranks of a torchrun; rank 0 prints one JSON object.

torchrun --nproc_per_node 2 tests/workers/vae_sharing.py
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import StableDiffusion3Pipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit.catalog.bundled import model_folder  # noqa: E402
from tests.support.dits import CASES, Case  # noqa: E402

CLIPS = {name: CASES[name] for name in ("wan", "hunyuan-video", "hunyuanvideo-1.5")}
COGVIDEOX = CASES["cogvideox"]
CLIPS["cogvideox"] = replace(COGVIDEOX, call={**COGVIDEOX.call, "num_frames": 17})
"""Cases whose VAEs are of videos; xDiT has CogVideoX's decoded by the last rank alone, here in two calls."""

PROMPT = "a large red circle on the left and a small blue square on the right, striped background"


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dist.init_process_group()
    pipe = StableDiffusionPipeline.from_pretrained(model_folder("tiny-sd"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    again = StableDiffusionImg2ImgPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    source = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(7))
    alone, changed_alone = image(pipe), image(again, image=source, strength=0.6)
    found: dict[str, Any] = {"error": {}, "sent": {}, "whole": {}}
    for vae in ("patches", "whole"):
        otil_xdit.parallelize(pipe, "sync", vae=vae)
        found["error"][vae] = difference(image(pipe), alone)
        found["sent"][vae] = otil_xdit.report(pipe).sent_bytes.get("vae")
        found["whole"][vae] = otil_xdit.summary(pipe).splitlines()[-1]
        otil_xdit.restore(pipe)
    otil_xdit.parallelize(pipe, "sync")
    previews: list[float] = []

    def preview(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Decode on rank 0 alone."""
        if dist.get_rank() == 0:
            previews.append(pipe.vae.decode(tensors["latents"] / pipe.vae.config.scaling_factor).sample.mean().item())
        return {}

    found["with_previews"] = difference(image(pipe, callback_on_step_end=preview), alone)
    found["previews"] = len(previews)
    pipe.vae.enable_tiling()
    found["tiled"] = otil_xdit.report(pipe).sent_bytes.get("vae") if image(pipe) is not None else None
    pipe.vae.disable_tiling()
    otil_xdit.restore(pipe)
    otil_xdit.parallelize(again, "sync")
    found["error"]["encoded"] = difference(image(again, image=source, strength=0.6), changed_alone)
    otil_xdit.restore(again)
    otil_xdit.parallelize(pipe, "sync")
    kind = "pt" if dist.get_rank() == 0 else "latent"
    found["one_decodes"] = [image(pipe, output_type=kind).shape[1], otil_xdit.report(pipe).sent_bytes.get("vae")]
    otil_xdit.restore(pipe)
    found["dit"] = of_a_dit()
    found["clips"] = {name: of_a_clip(case) for name, case in CLIPS.items()}
    found["left"] = sum("_otil" in name for part in pipe.vae.modules() for name in vars(type(part)))
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    if dist.get_rank() == 0:
        print(json.dumps({"ranks": ranks}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def of_a_clip(case: Case) -> dict[str, Any]:
    """How far a clip on all ranks is from one process's, None on a rank that gets none, and what its VAE sent."""
    torch.manual_seed(0)
    pipe = case.build()
    pipe.set_progress_bar_config(disable=True)

    def clip(pipe: Any) -> torch.Tensor | None:
        (made,) = pipe(**{**case.arguments(), "output_type": "pt", "return_dict": False})
        return None if made[0] is None else torch.as_tensor(made)

    alone = clip(pipe)
    assert alone is not None, "one process gets its clip"
    parallel = otil_xdit.parallelize(pipe, "sync")
    made = clip(parallel)
    error = None if made is None else difference(made, alone)
    sent = otil_xdit.report(parallel).sent_bytes.get("vae")
    return {"error": error, "sent": sent, "deviation": alone.std().item()}


def of_a_dit() -> dict[str, Any]:
    """The same of a pipeline whose wrapper has the last rank alone decode, and what that costs where it does not."""
    pipe = StableDiffusion3Pipeline.from_pretrained(
        model_folder("tiny-dit"), text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)

    def previewed(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Decode on every rank, of which the last one's VAE tells the others of the call at the end."""
        pipe.vae.decode(tensors["latents"])
        return {}

    def halved(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] / 2}

    alone, halved_alone, found = image(pipe), image(pipe, callback_on_step_end=halved), {}
    for vae in ("patches", "whole"):
        parallel = otil_xdit.parallelize(pipe, "sync", vae=vae)
        made = [image(parallel, output_type=kind) for kind in ("pt", "latent", "pt")]
        sent = otil_xdit.report(parallel).sent_bytes.get("vae")
        error = None if made[0] is None else max(difference(one, alone) for one in (made[0], made[2]))
        watched = [image(parallel, callback_on_step_end=previewed), image(parallel, callback_on_step_end=halved)]
        found[vae] = {
            "error": error,
            "sent": sent,
            "whole": otil_xdit.summary(parallel).splitlines()[-1],
            "previewed": None if watched[0] is None else difference(watched[0], alone),
            "halved": None if watched[1] is None else difference(watched[1], halved_alone),
        }
        pipe = otil_xdit.restore(parallel)
    try:
        otil_xdit.parallelize(pipe, "sync", ulysses_degree=2)
    except ValueError as error:
        found["one patch"] = str(error)
    found["left"] = sum("_otil" in name for part in pipe.vae.modules() for name in vars(type(part)))
    return found


def image(pipe: Any, **settings: Any) -> Any:
    """An image, [1, 3, 128, 128], of values in 0..1; None on a rank that gets none."""
    draw = torch.Generator().manual_seed(3)
    usual = {"num_inference_steps": 4, "guidance_scale": 4.0, "generator": draw, "output_type": "pt"}
    made = pipe(PROMPT, **{**usual, **settings})
    return None if made is None else made.images


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
