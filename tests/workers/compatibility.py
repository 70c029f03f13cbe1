"""What others may do to a pipeline before and after `parallelize`, on the ranks of a torchrun, as JSON lines of rank 0.

    torchrun --standalone --nproc_per_node 2 tests/workers/compatibility.py

A line for each kind of network and deed: the error's message or None, how many messages were sent, and whether the
images, if there is one in spite of the deed and after undoing it, are those of before.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from diffusers import hooks
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, JointAttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit.xdit.plugin.sessions import session_of  # noqa: E402
from tests.workers.tiny_dit import CIRCLE, load  # noqa: E402
from tests.workers.unet_session import image, pipeline  # noqa: E402

Undo = Callable[[], object]


@dataclass(frozen=True)
class Deed:
    """Something done to a pipeline; `do` gives what undoes it. `call` are arguments of the image that follows."""

    do: Callable[[Any], Undo]
    call: dict[str, Any] | None = None


def main() -> None:
    otil_xdit.register()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for kind, (deeds, make, draw) in {"unet": (UNET, pipeline, draw_unet), "dit": (DIT, load, draw_dit)}.items():
        pipe = otil_xdit.parallelize(make())
        first = draw(pipe)
        for name, deed in deeds.items():
            tell(kind, name, tried(pipe, deed, draw, first))
        otil_xdit.restore(pipe)
        for name in BEFORE[kind]:
            tell(kind, f"{name}, before", refused_before(make(), deeds[name], draw))
    dist.barrier()
    dist.destroy_process_group()


def tell(kind: str, name: str, found: dict[str, Any]) -> None:
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    if dist.get_rank() == 0:
        print(json.dumps({"kind": kind, "deed": name, "ranks": ranks}), flush=True)


def tried(pipe: Any, deed: Deed, draw: Callable[..., Any], first: torch.Tensor | None) -> dict[str, Any]:
    undo = deed.do(pipe)
    messages = session_of(pipe).communicator.collectives.traffic.messages
    messages.clear()
    refused, drawn = None, first
    try:
        drawn = draw(pipe, **(deed.call or {}))
    except ValueError as error:
        refused = str(error)
    sent = sum(messages.values())
    undo()
    again = draw(pipe)
    same = first is None or (torch.equal(drawn, first) and torch.equal(again, first))
    return {"refused": refused, "sent": sent, "same": same}


def refused_before(pipe: Any, deed: Deed, draw: Callable[..., Any]) -> dict[str, Any]:
    """The same, done to a pipeline that is parallelized afterwards."""
    undo = deed.do(pipe)
    wrapped, refused = pipe, None
    try:
        wrapped = otil_xdit.parallelize(pipe)
        draw(wrapped, **(deed.call or {}))
    except ValueError as error:
        refused = str(error)
    undo()
    otil_xdit.restore(wrapped)
    return {"refused": refused}


def draw_unet(pipe: Any, **call: Any) -> torch.Tensor:
    return image(pipe, steps=2, **call)


def draw_dit(pipe: Any, **call: Any) -> torch.Tensor | None:
    draw = torch.Generator().manual_seed(3)
    size = {**CIRCLE, "height": 64, "width": 64}
    made = pipe(**size, guidance_scale=4.0, num_inference_steps=2, generator=draw, output_type="latent", **call)
    return None if made is None else made.images


# ---- deeds ---------------------------------------------------------------------------------------------------------


class OwnProcessor(AttnProcessor):
    """Computes something else."""

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().__call__(*args, **kwargs) * 2


class OwnJointProcessor(JointAttnProcessor2_0):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        return tuple(one * 2 for one in made)


# As an IP-Adapter package names its copy of diffusers' class.
namesake: Any = type("AttnProcessor2_0", (OwnProcessor,), {"__module__": "ip_adapter.attention_processor"})


def network(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def some_attention(pipe: Any) -> Any:
    return next(
        m for p, m in network(pipe).named_modules() if p.endswith(("attn1", "attn")) and hasattr(m, "processor")
    )


def some_block(pipe: Any) -> Any:
    net = network(pipe)
    return net.mid_block.attentions[0].transformer_blocks[0] if hasattr(net, "mid_block") else net.transformer_blocks[1]


def attribute(find: Callable[[Any], Any], name: str, make: Callable[[Any], Any]) -> Deed:
    """Set an attribute of an object to what `make` makes of the object."""

    def do(pipe: Any) -> Undo:
        thing = find(pipe)
        was = vars(thing).get(name)
        setattr(thing, name, make(thing))
        return (lambda: delattr(thing, name)) if was is None else (lambda: setattr(thing, name, was))

    return Deed(do)


def wrapped_forward(module: Any) -> Callable[..., Any]:
    """A `forward` as DeepCache or cache-dit put it on a module."""
    plain = module.forward
    return lambda *args, **kwargs: plain(*args, **kwargs)


def all_processors(pipe: Any) -> Undo:
    was = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(OwnProcessor())
    return lambda: pipe.unet.set_attn_processor(was)


def of_transformer(pipe: Any) -> Undo:
    was = dict(pipe.transformer.attn_processors)
    pipe.transformer.set_attn_processor(OwnJointProcessor())
    return lambda: pipe.transformer.set_attn_processor(was)


def freeu(pipe: Any) -> Undo:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return pipe.disable_freeu


def token_merging(pipe: Any) -> Undo:
    """tomesd gives blocks a class of its own."""
    block = some_block(pipe)
    kind = type(block)
    block.__class__ = type("ToMeBlock", (kind,), {"__module__": "tomesd.patch"})
    return lambda: setattr(block, "__class__", kind)


def for_all_blocks(pipe: Any) -> Undo:
    plain = BasicTransformerBlock.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs)

    forward.__module__ = "hypertile"
    BasicTransformerBlock.forward = forward
    return lambda: setattr(BasicTransformerBlock, "forward", plain)


def hooked_by_diffusers(name: str) -> Callable[[Any], Undo]:
    def do(pipe: Any) -> Undo:
        block = some_block(pipe)
        registry = hooks.HookRegistry.check_if_exists_or_initialize(block)
        registry.register_hook(hooks.ModelHook(), name)

        def undo() -> None:
            registry.remove_hook(name)
            vars(block).pop("forward", None)

        return undo

    return do


def broadcast(pipe: Any) -> Undo:
    """Pyramid attention broadcast, as `enable_cache` applies it."""
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )
    hooks.apply_pyramid_attention_broadcast(network(pipe), config)

    def undo() -> None:
        for module in network(pipe).modules():
            if "_diffusers_hook" in vars(module):
                module._diffusers_hook.remove_hook("pyramid_attention_broadcast", recurse=False)
                vars(module).pop("forward", None)

    return undo


def cached_by_xdit(pipe: Any) -> Undo:
    from xfuser.model_executor.cache.utils import FBCachedTransformerBlocks

    net = network(pipe)
    blocks = net.transformer_blocks
    net = net if "transformer_blocks" in net._modules else net.module
    net.transformer_blocks = nn.ModuleList([FBCachedTransformerBlocks(blocks, num_steps=2)])
    return lambda: setattr(net, "transformer_blocks", blocks)


def offloaded(pipe: Any) -> Undo:
    net = network(pipe)
    accelerate.cpu_offload(net, execution_device=torch.device("cpu"))

    def undo() -> None:
        accelerate.hooks.remove_hook_from_module(net, recurse=True)
        for module in net.modules():
            vars(module).pop("forward", None)

    return undo


def offloaded_whole(pipe: Any) -> Undo:
    """As `enable_model_cpu_offload` does it."""
    _, hook = accelerate.cpu_offload_with_hook(network(pipe), execution_device=torch.device("cpu"))

    def undo() -> None:
        hook.remove()
        vars(network(pipe)).pop("forward", None)

    return undo


def dropout(pipe: Any) -> Undo:
    found = next(m for m in network(pipe).modules() if isinstance(m, nn.Dropout))
    found.p = 0.1
    network(pipe).train()

    def undo() -> None:
        found.p = 0.0
        network(pipe).eval()

    return undo


def quantised(pipe: Any) -> Undo:
    block = some_block(pipe)
    plain = block.ff.net[2]
    block.ff.net[2] = torch.ao.nn.quantized.dynamic.Linear(plain.in_features, plain.out_features)
    return lambda: block.ff.net.__setitem__(2, plain)


def no_deed(pipe: Any) -> Undo:
    return lambda: None


def with_gradients(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
    """As guidance by the gradient of a loss does it."""
    text = torch.zeros(1, 7, pipe.unet.config.cross_attention_dim)
    with torch.enable_grad():
        latents = given["latents"].detach().requires_grad_()
        pipe.unet(latents, timestep, encoder_hidden_states=text).sample.sum().backward()
    return given


def flip_on_rank_0(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"latents": given["latents"].flip(-1)} if dist.get_rank() == 0 and step == 1 else given


def flip_apart(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"latents": given["latents"].flip(-1 - dist.get_rank())}


UNET = {
    "set_attn_processor": Deed(all_processors),
    "a layer's processor": attribute(some_attention, "processor", lambda layer: OwnProcessor()),
    "a processor of a known name": attribute(some_attention, "processor", lambda layer: namesake()),
    "PAG's processor": attribute(some_attention, "processor", lambda layer: PAGIdentitySelfAttnProcessor2_0()),
    "FreeU": Deed(freeu),
    "forward of a block": attribute(some_block, "forward", wrapped_forward),
    "forward of the network": attribute(network, "forward", wrapped_forward),
    "token merging": Deed(token_merging),
    "forward of a class": Deed(for_all_blocks),
    "a hook of diffusers": Deed(hooked_by_diffusers("fbc_leader_block_hook")),
    "CPU offload": Deed(offloaded),
    "model offload": Deed(offloaded_whole),
    "dropout": Deed(dropout),
    "quantised": Deed(quantised),
    "step of the scheduler": attribute(lambda pipe: pipe.scheduler, "step", lambda made: made.step),
    "gradients": Deed(no_deed, {"callback_on_step_end": with_gradients}),
    "latents of one rank changed": Deed(no_deed, {"callback_on_step_end": flip_on_rank_0}),
    "latents changed apart": Deed(no_deed, {"callback_on_step_end": flip_apart}),
}
DIT = {
    "set_attn_processor": Deed(of_transformer),
    "a layer's processor": attribute(some_attention, "processor", lambda layer: OwnJointProcessor()),
    "pyramid attention broadcast": Deed(broadcast),
    "a hook of diffusers": Deed(hooked_by_diffusers("faster_cache_block")),
    "xDiT's cache": Deed(cached_by_xdit),
    "forward of a block": attribute(some_block, "forward", wrapped_forward),
    "token merging": Deed(token_merging),
    "dropout": Deed(dropout),
    "quantised": Deed(quantised),
    "an argument that xDiT does not read": Deed(no_deed, {"skip_guidance_layers": [1]}),
    "CPU offload": Deed(offloaded_whole),
    "a hook that casts weights": Deed(hooked_by_diffusers("layerwise_casting")),
}
BEFORE = {
    "unet": ("model offload", "set_attn_processor", "forward of a block", "token merging", "CPU offload", "quantised"),
    "dit": ("set_attn_processor", "pyramid attention broadcast", "forward of a block", "token merging", "quantised"),
}

if __name__ == "__main__":
    main()
