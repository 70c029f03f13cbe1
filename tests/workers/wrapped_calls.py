"""Arguments of the calls of pipelines that xDiT wraps, on the ranks of a torchrun; rank 0 prints a JSON line for each.

    torchrun --standalone --nproc_per_node 2 tests/workers/wrapped_calls.py [--cfg]

A line: the largest difference of the latents to one process under `sync`, or the refusal; for what is exact also the
difference without `otil_xdit.runtime.callbacks`.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from diffusers.callbacks import SD3CFGCutoffCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit.runtime import session, steps  # noqa: E402

otil_xdit.register()

from tests.support.dits import CASES  # noqa: E402

Probe = Any
"""Arguments of the call, or what is done to a pipeline before `parallelize`, or `Loaded`."""


def flip(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"].flip(-2) if step == 0 else tensors["latents"]}


def scale(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["latents"].mul_(0.9)
    return {}


def flip_on_rank_0(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return flip(pipe, step, timestep, tensors) if dist.get_rank() == 0 else tensors


def unguided(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = 0.0
    return tensors


def mirror(step: int, timestep: Any, latents: torch.Tensor) -> None:
    if step == 0:
        latents.copy_(latents.flip(-2))


@dataclass(frozen=True)
class Loaded:
    """LoRA that is loaded after `parallelize`, for layers of a network; a file of it has their names of diffusers."""

    layers: tuple[str, ...]
    after: bool = True

    def load(self, pipe: Any, network: Any) -> None:
        dice, weights = torch.Generator().manual_seed(1), {}
        for layer in self.layers:
            shape = network.get_submodule(layer).weight.shape
            shapes = {"lora_A": (2, *shape[1:]), "lora_B": (shape[0], 2, *(1 for _ in shape[2:]))}
            for part, size in shapes.items():
                weights[f"transformer.{layer}.{part}.weight"] = torch.randn(size, generator=dice) * 0.3
        pipe.load_lora_weights(weights, adapter_name="drawn")
        pipe.set_adapters(["drawn"], [0.8])


def stepped_by(kind: Any, **settings: Any) -> Callable[[Any], None]:
    return lambda pipe: setattr(pipe, "scheduler", kind(**settings))


FLIP, SCALE = {"callback_on_step_end": flip}, {"callback_on_step_end": scale}
NOISY = stepped_by(FlowMatchEulerDiscreteScheduler, stochastic_sampling=True)
ATTENTION = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v", "transformer_blocks.1.attn.to_out.0")
UNGUIDED = {"guidance_scale": 1.0, "negative_prompt_embeds": None}
VELOCITY = {"prediction_type": "v_prediction", "clip_sample": False}
PROBES: dict[str, dict[str, Probe]] = {
    "sd3": {
        "flip": FLIP,
        "scale": SCALE,
        "noise": NOISY,
        "one rank flips": {"callback_on_step_end": flip_on_rank_0},
        "guidance cut by diffusers": {"callback_on_step_end": SD3CFGCutoffCallback(cutoff_step_ratio=0.4)},
        "guidance cut": {"callback_on_step_end": unguided},
        "LoRA loaded afterwards": Loaded(ATTENTION),
        "LoRA of a layer of xDiT's": Loaded(("pos_embed.proj",)),
        "two images without guidance": {"guidance_scale": 1.0, "num_images_per_prompt": 2},
    },
    "sd3, 7 rows": {"flip": FLIP, "noise": NOISY},
    "pixart-sigma": {
        "mirror": {"callback": mirror},
        "noise": stepped_by(LCMScheduler, **VELOCITY),
        "without guidance": {"guidance_scale": 1.0},
    },
    "hunyuandit": {
        "flip": FLIP,
        "noise": stepped_by(DDPMScheduler, **VELOCITY),
        "without guidance": {"guidance_scale": 1.0},
        "guidance_rescale": {"guidance_rescale": 0.7},
    },
    "flux": {"7 rows": {"height": 112}, "flip": FLIP, "noise": NOISY, "LoRA loaded afterwards": Loaded(ATTENTION)},
    "flux2": {"flip": FLIP, "attention_kwargs": {"attention_kwargs": {"scale": 0.5}}},
    "flux2-klein": {"without guidance": {**UNGUIDED, "output_type": "pt"}, "latents": UNGUIDED},
    "cogvideox": {"flip": FLIP, "scale": SCALE, "without guidance": {"guidance_scale": 1.0}},
}


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for name, probes in PROBES.items():
        if "--cfg" in sys.argv and not CASES[name].cfg:
            continue
        for label, probe in probes.items():
            found = measured(name, probe)
            if isinstance(probe, Loaded) and found["difference"] is not None:
                found["without"] = measured(name, replace(probe, after=False))["difference"]
            elif found["difference"] is not None and "--cfg" not in sys.argv:
                with as_xdit_does():
                    found["without"] = measured(name, probe)["difference"]
            if dist.get_rank() == 0:
                print(json.dumps({"case": name, "call": label, **found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def as_xdit_does() -> Iterator[None]:
    with (
        patch.object(session.StepCallbacks, "put_into", lambda self, call, args, kwargs: (args, kwargs)),
        patch.object(steps, "steps_by_the_value", lambda scheduler, arguments: True),
    ):
        yield


def measured(name: str, probe: Probe) -> dict[str, Any]:
    """The difference on the ranks that have latents, and the refusals by rank."""
    pipe, plain, refused = built(name, probe), built(name, probe), None
    if isinstance(probe, Loaded):
        probe.load(pipe, pipe.transformer)
    alone, network = latents(pipe, name, probe), copy.deepcopy(plain.transformer)
    pipe = otil_xdit.parallelize(plain, "sync", use_cfg_parallel="--cfg" in sys.argv)
    try:
        if isinstance(probe, Loaded) and probe.after:
            probe.load(pipe, network)
        made = latents(pipe, name, probe)
    except (ValueError, KeyError) as error:
        made, refused = None, str(error)
    otil_xdit.restore(pipe)
    difference = (made - alone).abs().max().item() if made is not None and alone is not None else None
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (difference, refused))
    return {
        "difference": max((one for one, _ in ranks if one is not None), default=None),
        "refused": [said for _, said in ranks],
    }


def built(name: str, probe: Probe) -> Any:
    torch.manual_seed(0)
    pipe = CASES[name].build()
    pipe.set_progress_bar_config(disable=True)
    if callable(probe):
        probe(pipe)
    return pipe


@torch.no_grad()
def latents(pipe: Any, name: str, probe: Probe) -> torch.Tensor | None:
    """The final latents; None on ranks without them, and where diffusers does not make them."""
    torch.manual_seed(0)
    try:
        made = pipe(**{**CASES[name].arguments(), **(probe if isinstance(probe, dict) else {})}, return_dict=False)
    except (RuntimeError, TypeError):  # embeddings are not repeated for several images
        return None
    return made[0] if made is not None and isinstance(made[0], torch.Tensor) else None


if __name__ == "__main__":
    main()
