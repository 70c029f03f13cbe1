"""Long-lived pipelines on the ranks of a torchrun: each image against a fresh pipeline's, and what `restore` leaves.

    torchrun --standalone --nproc_per_node 2 tests/workers/state.py [--all]

Rank 0 prints a JSON line for each network and setting: the names of the images that differ from a fresh pipeline's, by
rank, and what differs after `restore`. With --all there are all networks and settings, and each kind of call is
followed by each other one.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from peft import LoraConfig
from torch.distributed import distributed_c10d

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit import OtilConfig, get_strategy  # noqa: E402
from otil_xdit.xdit.plugin.sessions import session_of  # noqa: E402
from tests.support.unets.configs import build_unet  # noqa: E402
from tests.support.unets.pipelines import pipeline_around  # noqa: E402
from tests.workers.tiny_dit import load  # noqa: E402
from tests.workers.unet_session import pipeline  # noqa: E402

CONFIGS = {
    "otil": OtilConfig(fresh_share=0.0, ratio=0.5, warmup_steps=1),
    "paper": get_strategy("otil-paper").make_config({"ratio": 0.5, "warmup_steps": 1}),
}
PLAIN: dict[str, Any] = {"height": 128, "width": 128, "num_inference_steps": 3, "guidance_scale": 4.0}
UNET_CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "larger": {"height": 192, "width": 160},
    "batch": {"num_images_per_prompt": 2},
    "steps": {"num_inference_steps": 6},
    "scheduler": {"scheduler": "dpm"},
    "no guidance": {"guidance_scale": 1.0},
    "much guidance": {"guidance_scale": 7.5},
    "long prompt": {"tokens": 14},
    "LoRA": {"lora": True},
}
DIT_CALLS = {
    "plain": {},
    "larger": {"height": 160, "width": 128},
    "batch": {"num_images_per_prompt": 2},
    "steps": {"num_inference_steps": 6},
    "much guidance": {"guidance_scale": 7.5},
    "long prompt": {"tokens": 154},
}
INTERRUPTIONS = ("callback", "Ctrl-C", "scheduler", "network")


def main() -> None:
    otil_xdit.register()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    kinds: dict[str, Any] = {"unet": (pipeline, draw_unet, UNET_CALLS), "dit": (load, draw_dit, DIT_CALLS)}
    if "--all" not in sys.argv:
        del UNET_CALLS["much guidance"]  # another number where "no guidance" is another batch
    for kind, (make, draw, calls) in kinds.items():
        for name, config in CONFIGS.items():
            if "--all" in sys.argv or (kind, name) == ("unet", "otil"):
                tell(f"{kind}, {name}", compared(make, draw, calls, config))
        tell(f"{kind}, restored", restored(make, draw))
        tell(f"{kind}, score", refused_score(make, draw))
        tell(f"{kind}, told", told(make, draw))
    tell("side by side", side_by_side())
    tell("denoising_end", counted_steps())
    tell("other degrees", other_degrees())
    dist.barrier()
    dist.destroy_process_group()


def tell(name: str, found: Any) -> None:
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    if dist.get_rank() == 0:
        print(json.dumps({"name": name, "ranks": ranks}), flush=True)


# ---- one pipeline after another --------------------------------------------------------------------------------------


def compared(
    make: Callable[[], Any], draw: Callable[..., Any], calls: dict[str, dict[str, Any]], config: OtilConfig
) -> dict[str, Any]:
    """The images of one pipeline, one after the other, that are not those of fresh ones."""
    expected = {}
    for name, call in calls.items():
        pipe = otil_xdit.parallelize(make(), config=config)
        expected[name] = draw(pipe, **call)
        otil_xdit.restore(pipe)
    order = [*calls]
    if "--all" in sys.argv:
        order = [name for first in calls for second in calls for name in (first, second)]
    pipe, wrong = otil_xdit.parallelize(make(), config=config), []
    for number, name in enumerate(order):
        how = INTERRUPTIONS[number % len(INTERRUPTIONS)]
        interrupt(pipe, how, draw, calls[order[number - 1]], after=1 + number % 2)
        made = draw(pipe, **calls[name])
        if made is not None and not torch.equal(made, expected[name]):
            wrong.append(f"{name} after {how} in {order[number - 1]}")
    otil_xdit.restore(pipe)
    distinct = [name for name, image in expected.items() if image is not None and torch.equal(image, expected["plain"])]
    return {"compared": len(order), "wrong": wrong, "like plain": distinct}


class Broken(Exception):
    """What an interruption raises."""


def interrupt(pipe: Any, how: str, draw: Callable[..., Any], call: dict[str, Any], after: int) -> None:
    """Begin an image and break it off on all ranks after some steps."""
    kind = KeyboardInterrupt if how == "Ctrl-C" else Broken
    left = [after]

    def count() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise kind

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        count()
        return given

    undo: Callable[[], Any] = int
    more: dict[str, Any] = {}
    if how in ("callback", "Ctrl-C"):
        more["callback_on_step_end"] = callback
    elif how == "scheduler":
        undo = counted_step(type(pipe.scheduler), count)
    else:
        network = getattr(pipe, "unet", None) or pipe.transformer
        layers = [module for path, module in network.named_modules() if path.endswith(("attn1", "attn"))]
        undo = layers[len(layers) // 2].register_forward_pre_hook(lambda *given: count()).remove
    try:
        draw(pipe, **call, **more)
        raise AssertionError(f"{how} did not break the image off")
    except kind:
        pass
    finally:
        undo()


def counted_step(kind: Any, count: Callable[[], None]) -> Callable[[], Any]:
    """Let a scheduler's class call `count` in each step; what undoes it."""
    plain = kind.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        count()
        return plain(self, *args, **kwargs)

    kind.step = step
    return lambda: setattr(kind, "step", plain)


def draw_unet(pipe: Any, tokens: int = 7, scheduler: str = "", lora: bool = False, **call: Any) -> torch.Tensor:
    """Latents of an image; scheduler and LoRA are changed for this one only."""
    before = pipe.scheduler
    if scheduler:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(before.config)
    if lora:
        torch.manual_seed(5)
        targets = ["conv1", "to_q", "to_v"]
        pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False), "one")
        pipe.unet.eval()
    try:
        draw = torch.Generator().manual_seed(7)
        words = torch.randn(2, 1, tokens, pipe.unet.config.cross_attention_dim, generator=draw)
        text = {"prompt_embeds": words[0], "negative_prompt_embeds": words[1]}
        return pipe(**text, **{**PLAIN, **call}, generator=draw, output_type="latent").images
    finally:
        pipe.scheduler = before
        if lora:
            pipe.unet.delete_adapters("one")


def draw_dit(pipe: Any, tokens: int = 0, **call: Any) -> torch.Tensor | None:
    draw = torch.Generator().manual_seed(3)
    text: dict[str, Any] = {"prompt": "a large red circle on the left, striped background"}
    if tokens:
        config = pipe.transformer.config
        embeds = torch.randn(2, 1, tokens, config.joint_attention_dim, generator=draw)
        pooled = torch.randn(2, 1, config.pooled_projection_dim, generator=draw)
        text = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
        text |= {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
    made = pipe(**text, **{**PLAIN, **call}, generator=draw, output_type="latent")
    return None if made is None else made.images


# ---- restore ---------------------------------------------------------------------------------------------------------


def restored(make: Callable[[], Any], draw: Callable[..., Any]) -> dict[str, Any]:
    """What differs after `restore`: attributes and classes, and the image of one rank; twice."""
    pipe = make()
    alone, before = draw(pipe), anatomy(pipe)
    found: dict[str, Any] = {"changed": [], "same image": [], "while": []}
    for config in (CONFIGS["otil"], OtilConfig(freshness="sync")):
        together = otil_xdit.parallelize(pipe, config=config)
        draw(together)
        found["while"].append(anatomy(pipe) != before and session_of(together) is not None)
        run = session_of(together).communicator
        assert otil_xdit.restore(together) is pipe and otil_xdit.restore(pipe) is pipe
        after = anatomy(pipe)
        found["changed"] += [str(key) for key in {**before, **after} if before.get(key) != after.get(key)]
        found["same image"].append(torch.equal(draw(pipe), alone))
        found["buffers"] = run.report().buffer_bytes
    return found


def refused_score(make: Callable[[], Any], draw: Callable[..., Any]) -> dict[str, Any]:
    """A score that needs two tokens a side, and sub-blocks that have one at some level (one everywhere, for a DiT)."""
    pipe = otil_xdit.parallelize(make(), config=OtilConfig(select="kv-dhash", block_size=2))
    try:
        draw(pipe)
        refused = ""
    except ValueError as error:
        refused = str(error)
    messages = sum(sum(count.values()) for count in session_of(pipe).report().messages.values())
    otil_xdit.restore(pipe)
    return {"refused": refused, "messages": messages}


def told(make: Callable[[], Any], draw: Callable[..., Any]) -> dict[str, Any]:
    """What is logged of memory before and after an image of the pipeline's own size, and the buffers in MB."""
    pipe, said = make(), logging.handlers.BufferingHandler(10**6)
    if hasattr(pipe, "unet"):
        pipe.unet.register_to_config(sample_size=24)  # its own would take seconds
    logger = logging.getLogger("otil_xdit")
    logging.disable(logging.NOTSET)
    logger.setLevel(logging.INFO)
    logger.addHandler(said)
    together = otil_xdit.parallelize(pipe, config=CONFIGS["otil"])
    draw(together, height=None, width=None)
    buffers = session_of(together).report().buffer_bytes / 1e6
    logger.removeHandler(said)
    logging.disable(logging.WARNING)
    otil_xdit.restore(together)
    return {"lines": [record.getMessage() for record in said.buffer], "buffers": buffers}


def anatomy(pipe: Any) -> dict[Any, Any]:
    """Classes and attributes of a pipeline, its scheduler and its network's modules."""
    found: dict[Any, Any] = {}
    for name, part in (("pipeline", pipe), ("scheduler", pipe.scheduler)):
        found[name] = type(part), {key: _told(value) for key, value in vars(part).items()}
    network = getattr(pipe, "unet", None) or pipe.transformer
    for path, module in network.named_modules():
        found[path] = id(module), type(module), {key: _told(value) for key, value in vars(module).items()}
    return found


def _told(value: Any) -> Any:
    """An attribute's value as far as it can be compared."""
    if isinstance(value, dict):
        return {key: id(one) if isinstance(one, torch.nn.Module) else _told(one) for key, one in value.items()}
    if isinstance(value, torch.Tensor) and value.numel() <= 1000:  # a scheduler makes its own anew for each image
        return value.tolist()
    if isinstance(value, (torch.Tensor, torch.nn.Module)) or callable(value):
        return id(value)
    return repr(value)


def side_by_side() -> list[bool]:
    """Whether a DiT and a U-Net in turns make the images that each makes alone: xDiT has one state for both."""
    pipes, same = [], []
    for make, draw in ((load, draw_dit), (pipeline, draw_unet)):
        pipe = otil_xdit.parallelize(make(), config=CONFIGS["otil"])
        pipes.append((pipe, draw, draw(pipe)))
    for pipe, draw, first in pipes * 2:
        again = draw(pipe)
        same.append(again is None or torch.equal(again, first))
    for pipe, *_ in pipes:
        otil_xdit.restore(pipe)
    return same


def counted_steps() -> list[int | None]:
    """The clock's total in a whole image of SDXL, and in one that ends early and one that begins late."""
    pipe = otil_xdit.parallelize(pipeline_around(build_unet("sdxl")), config=CONFIGS["otil"])
    assert isinstance(pipe, StableDiffusionXLPipeline)
    pipe.set_progress_bar_config(disable=True)
    width, draw, totals = pipe.unet.config.cross_attention_dim, torch.Generator().manual_seed(1), []
    for ends in ({}, {"denoising_end": 0.5}):
        words, pooled = torch.randn(2, 1, 7, width, generator=draw), torch.randn(2, 1, 24, generator=draw)
        text = {"prompt_embeds": words[0], "negative_prompt_embeds": words[1]}
        text |= {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
        pipe(**text, height=128, width=128, num_inference_steps=8, output_type="latent", generator=draw, **ends)
        clock = session_of(pipe).communicator.clock
        totals += [clock.total, clock.step]
    otil_xdit.restore(pipe)
    return totals


def other_degrees() -> dict[str, Any]:
    """What we compute in two CFG groups and xDiT on two Ulysses ranks, once nobody uses groups of two patches."""
    from xfuser import xFuserArgs, xFuserStableDiffusion3Pipeline
    from xfuser.core.distributed import parallel_state

    alone, found = draw_dit(load()), {}
    for name in ("ours", "xDiT"):
        unused = otil_xdit.parallelize(pipeline(), config=CONFIGS["otil"])
        found[f"{name}: groups"] = len(distributed_c10d._world.pg_map)
        try:
            otil_xdit.parallelize(load(), "sync", use_cfg_parallel=True)
        except ValueError as error:
            found["refused"] = str(error)
        otil_xdit.restore(unused)
        if name == "ours":
            pipe = otil_xdit.parallelize(load(), "sync", use_cfg_parallel=True)
        else:
            engine_config, _ = xFuserArgs(model="tiny-dit", ulysses_degree=2).create_config()
            engine_config.runtime_config.dtype = torch.float32
            pipe = xFuserStableDiffusion3Pipeline(load(), engine_config)
        sequence, made = parallel_state.get_sp_group(), draw_dit(pipe)
        found[name] = [sequence.ring_world_size, sequence.ulysses_world_size]
        found[f"{name}: error"] = None if made is None else (made - alone).abs().max().item()
        otil_xdit.restore(pipe)
    return found


if __name__ == "__main__":
    main()
