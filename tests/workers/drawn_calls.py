"""Calls drawn at random, on the ranks of a torchrun: each gives what one process gives under `sync`, or is refused.

    torchrun --standalone --nproc_per_node 2 tests/workers/drawn_calls.py [--first 0] [--count 500] [--verbose]

A draw is a pipeline of those that the plugin runs, how its ranks are shared out, a scheduler, and arguments out of the
signature of diffusers' own call. What diffusers in one process does not take is not tried on the ranks. Otherwise
either all ranks that get a result get that of one process, or all refuse the call with a `ValueError` before the first
step. Rank 0 prints a JSON line for each draw, and one at the end. Exit code 1 where a draw did neither.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402

otil_xdit.register()

from otil_xdit import OtilConfig  # noqa: E402
from otil_xdit.catalog.schedulers import make_scheduler  # noqa: E402
from otil_xdit.method.schedule import Clock  # noqa: E402
from tests.support.dits import CASES  # noqa: E402
from tests.support.in_rank import described, leave_groups  # noqa: E402
from tests.support.unet_scenes.edits import controlled  # noqa: E402
from tests.support.unet_scenes.parts import SIZE, drawn, mask, pipeline  # noqa: E402

PATIENCE = 40
"""Seconds that a rank waits for the others."""
TOLERANCE = 1e-3
"""Of a result, relative to its largest value: guided steps and a decoder amplify roundings to 1e-4 at most."""
OF_PIXELS = 2.5 / 255
"""The same of images of whole numbers, of which a rounding may move one by a step."""

UNETS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sd1.5": (lambda: pipeline(StableDiffusionPipeline), {}),
    "sd2": (lambda: pipeline(StableDiffusionPipeline, "sd2"), {}),
    "sdxl": (lambda: pipeline(StableDiffusionXLPipeline, "sdxl"), {}),
    "img2img": (lambda: pipeline(StableDiffusionImg2ImgPipeline), {"image": drawn(), "strength": 0.7}),
    "sdxl img2img": (
        lambda: pipeline(StableDiffusionXLImg2ImgPipeline, "sdxl"),
        {"image": drawn(), "strength": 0.7},
    ),
    "inpaint": (lambda: pipeline(StableDiffusionInpaintPipeline), {"image": drawn(), "mask_image": mask()}),
    "controlnet": (controlled(StableDiffusionControlNetPipeline, "sd1.5"), {"image": drawn(2)}),
    "sdxl controlnet": (controlled(StableDiffusionXLControlNetPipeline, "sdxl"), {"image": drawn(2)}),
}
DITS = [name for name, case in CASES.items() if case.network is None and "," not in name and name != "consisid"]
SAMPLERS = ("own", "own", "ddim", "dpm-solver", "unipc", "euler", "euler-a", "heun", "pndm")


def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {}


def scale(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * 0.9} if "latents" in tensors else {}


def flip(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"].flip(-2)} if "latents" in tensors and step == 0 else {}


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


SCALED = [{"scale": 0.5}, {}]
SIDES = [(64, 96), (128, 128), (96, 72)]
VALUES: dict[str, list[Any]] = {
    "num_inference_steps": [1, 2, 3, 4],
    "guidance_scale": [0.0, 1.0, 1.5, 4.0, 7.5],
    "guidance_scale_2": [1.0, 3.0],
    "true_cfg_scale": [1.0, 3.0],
    "cfg_normalization": [True, False],
    "cfg_truncation": [0.5, 1.0],
    "guidance_rescale": [0.0, 0.5],
    "eta": [0.0, 0.5, 1.0],
    "num_images_per_prompt": [1, 2],
    "num_videos_per_prompt": [1, 2],
    "strength": [0.4, 0.9, 1.0],
    "timesteps": [[999, 600, 200]],
    "sigmas": [[1.0, 0.7, 0.3], [1.0, 0.4]],
    "output_type": ["latent", "latent", "pt", "np", "pil"],
    "return_dict": [True, False],
    "max_sequence_length": [64, 128],
    "denoising_end": [0.6],
    "denoising_start": [0.3],
    "aesthetic_score": [5.0],
    "padding_mask_crop": [8],
    "original_size": SIDES,
    "target_size": SIDES,
    "crops_coords_top_left": [(8, 16)],
    "negative_original_size": SIDES,
    "negative_target_size": SIDES,
    "negative_crops_coords_top_left": [(4, 0)],
    "cross_attention_kwargs": SCALED,
    "attention_kwargs": SCALED,
    "joint_attention_kwargs": SCALED,
    "callback_on_step_end": [look, scale, flip],
    "callback_on_step_end_tensor_inputs": [["latents"], []],
    "callback": [lambda step, timestep, latents: None, lambda step, timestep, latents: latents.mul_(0.9)],
    "callback_steps": [1, 2],
    "generator": [lambda: None, lambda: seeded(3), lambda: [seeded(4)], lambda: [seeded(4), seeded(5)]],
    "skip_guidance_layers": [[0]],
    "skip_layer_guidance_scale": [2.0],
    "mu": [0.7],
    "use_resolution_binning": [True, False],
    "clean_caption": [False],
    "guess_mode": [True],
    "controlnet_conditioning_scale": [0.5],
    "control_guidance_start": [0.3],
    "control_guidance_end": [0.7],
    "frame_rate": [12],
    "num_frames": [5, 9],
    "decode_timestep": [0.0],
    "noise_scale": [0.5],
}
"""By an argument's name, what it may be; a function without parameters makes it anew for each call."""


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=2 * PATIENCE))
    from xfuser.core.distributed import init_distributed_environment

    init_distributed_environment()
    counts: Counter[str] = Counter()
    for number in range(arguments.first, arguments.first + arguments.count):
        line = tried(number)
        counts[line["end"]] += 1
        leave_groups()
        if dist.get_rank() == 0 and (arguments.verbose or line["end"] == "WRONG"):
            print(json.dumps(line), flush=True)
        if line["is_broken"]:
            break
    if dist.get_rank() == 0:
        print(json.dumps({"draws": counts.total(), **counts}), flush=True)
    dist.destroy_process_group()
    return int(counts["WRONG"] > 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=int, default=0, help="the first draw's number; each is the same every time")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--verbose", action="store_true", help="a line for those that are right, too")
    return parser.parse_args()


def tried(number: int) -> dict[str, Any]:
    """What rank 0 prints about one draw; every rank takes part."""
    started, dice = time.perf_counter(), random.Random(number)
    name = dice.choice([*UNETS, *DITS])
    degrees = dice.choice([{}, {}, {}, {"use_cfg_parallel": True}, {"ulysses_degree": 2} if name in UNETS else {}])
    sampler = dice.choice(SAMPLERS) if name in UNETS else "own"
    call = drawn_call(dice, name)
    said = {"draw": number, "pipeline": name, "degrees": degrees, "sampler": sampler, "call": shown(call)}
    ranks: list[Any] = [None] * dist.get_world_size()
    try:
        alone = made(built(name, sampler), name, call)
    except Exception as error:  # what diffusers does not take need not be tried
        found: tuple[str, Any] = ("not for diffusers", described(error))
    else:
        found = on_ranks(name, sampler, degrees, call, alone)
    dist.all_gather_object(ranks, found)
    end, why = verdict(ranks)
    seconds = round(time.perf_counter() - started, 1)
    return {**said, "end": end, "why": why, "seconds": seconds, "is_broken": any(of == "broken" for of, _ in ranks)}


def drawn_call(dice: random.Random, name: str) -> dict[str, Any]:
    """Some arguments of a pipeline's call, of those that it has."""
    kind = type(built(name, "own"))
    known = [one for one in signature(kind.__call__).parameters if one in VALUES or one in ("height", "width")]
    call = {}
    for argument in dice.sample(known, min(len(known), dice.randint(1, 5))):
        if argument in ("height", "width"):
            usual = SIZE if name in UNETS else CASES[name].call.get(argument, 128)
            call[argument] = usual + dice.choice([0, 8, 16, 32] if name in UNETS else [0, 16, 32])
        else:
            call[argument] = dice.choice(VALUES[argument])
    return call


def built(name: str, sampler: str) -> Any:
    """A pipeline of that name, with the same weights each time."""
    torch.manual_seed(0)
    pipe = UNETS[name][0]() if name in UNETS else CASES[name].build()
    if sampler != "own":
        pipe.scheduler = make_scheduler(sampler, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def made(pipe: Any, name: str, call: Mapping[str, Any]) -> torch.Tensor | None:
    """What a call gives, as a tensor; None on ranks that get nothing."""
    if name in UNETS:
        given = {"prompt": "a large red circle", "num_inference_steps": 3, "generator": seeded(7), **UNETS[name][1]}
    else:
        given = CASES[name].arguments()
    anew = {one: value() if one == "generator" else value for one, value in call.items()}
    torch.manual_seed(11)
    output = pipe(**{**given, "output_type": "latent", **anew})
    return None if output is None else tensor_of(output)


def tensor_of(output: Any) -> torch.Tensor | None:
    """The images, frames or latents of what a pipeline returns."""
    found = output[0]
    while isinstance(found, (list, tuple)) and len(found) == 1 and not isinstance(found[0], torch.Tensor):
        found = found[0]
    if found is None or isinstance(found, bool):
        return None
    if isinstance(found, (list, tuple)):
        parts = [one if isinstance(one, torch.Tensor) else torch.as_tensor(numpy.asarray(one)) for one in found]
        return torch.stack(parts).float() if parts else None
    return found.float() if isinstance(found, torch.Tensor) else torch.as_tensor(numpy.asarray(found)).float()


def on_ranks(
    name: str, sampler: str, degrees: Mapping[str, Any], call: Mapping[str, Any], alone: torch.Tensor | None
) -> tuple[str, Any]:
    """How this rank's call ends, and why."""
    steps: list[int] = []
    tick, pipe = Clock.tick, built(name, sampler)

    def counted(clock: Clock) -> None:
        steps.append(1)
        tick(clock)

    Clock.tick = counted  # type: ignore[method-assign]  # before the first step nothing has been counted
    parallel = None
    try:
        config = OtilConfig(freshness="sync", timeout=PATIENCE)
        parallel = otil_xdit.parallelize(pipe, config=config, **degrees)
        result = made(parallel, name, call)
    except ValueError as error:
        return ("late" if steps else "refused"), str(error)
    except Exception as error:
        return "broken", described(error)
    finally:
        Clock.tick = tick  # type: ignore[method-assign]
        if parallel is not None:
            otil_xdit.restore(parallel)
    if result is None or alone is None:
        return "nothing", None
    if result.shape != alone.shape:
        return "other", f"{tuple(result.shape)} for {tuple(alone.shape)}"
    if not alone.numel():
        return "equal", "no images"
    largest = alone.abs().max().item()
    bound = 255 * OF_PIXELS if call.get("output_type") == "pil" else TOLERANCE * max(largest, 1e-3)
    error = (result - alone).abs().max().item()
    return ("equal" if error <= bound else "other"), f"{error:.1e} of {largest:.1e}"


def verdict(ranks: list[tuple[str, Any]]) -> tuple[str, str]:
    """How a draw ended, and why, by how it ended on every rank."""
    ends = {end for end, _ in ranks}
    why = next((str(said) for end, said in ranks if end not in ("equal", "nothing")), str(ranks[0][1]))
    if ends == {"refused"}:
        return "refused", why
    if ends in ({"equal"}, {"equal", "nothing"}):
        return "equal", next(str(said) for end, said in ranks if end == "equal")
    return ("not for diffusers", why) if ends == {"not for diffusers"} else ("WRONG", str(ranks))


def shown(call: Mapping[str, Any]) -> dict[str, str]:
    return {name: getattr(value, "__name__", None) or repr(value) for name, value in call.items()}


if __name__ == "__main__":
    sys.exit(main())
