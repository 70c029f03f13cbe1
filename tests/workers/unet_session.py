"""What a pipeline with a U-Net does on the ranks of a torchrun, besides being exact; rank 0 prints one JSON object.

torchrun --standalone --nproc_per_node 2 tests/workers/unet_session.py
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from peft import LoraConfig
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit import OtilConfig, get_strategy  # noqa: E402
from otil_xdit.networks.unet.layers import unwrapped_layers  # noqa: E402
from otil_xdit.xdit.plugin.sessions import session_of  # noqa: E402
from tests.support.unets.configs import build_unet  # noqa: E402
from tests.support.unets.pipelines import pipeline_around  # noqa: E402

PIXELS = 8
DISPLACED = get_strategy("otil-paper").make_config({"ratio": 0.5, "warmup_steps": 2, "select": "kv-cosine"})


def main() -> None:
    otil_xdit.register()
    torch.set_num_threads(1)
    checks = (repeats, idle, noise, interrupted, shared_network, undone, counted, controlled, unequal, paired)
    found = {check.__name__: check() for check in checks}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    if dist.get_rank() == 0:
        print(json.dumps({name: [rank[name] for rank in ranks] for name in found}), flush=True)
    dist.destroy_process_group()


def pipeline(unet: nn.Module | None = None) -> Any:
    pipe = pipeline_around(build_unet("sd1.5") if unet is None else unet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any, rows: int = 24, cols: int = 16, steps: int = 5, **more: Any) -> torch.Tensor:
    """Latents, [1, 4, rows, cols]."""
    draw = torch.Generator().manual_seed(7)
    words = torch.randn(2, 1, 7, pipe.unet.config.cross_attention_dim, generator=draw)
    call = {"prompt_embeds": words[0], "negative_prompt_embeds": words[1], "generator": draw, **more}
    size = {"height": rows * PIXELS, "width": cols * PIXELS}
    return pipe(**call, **size, num_inference_steps=steps, guidance_scale=4.0, output_type="latent").images


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def repeats() -> list[str]:
    """An image, others of another size, number of steps and batch, and the first again."""
    pipe = otil_xdit.parallelize(pipeline(), config=DISPLACED)
    sizes = ({}, {"rows": 32, "cols": 24}, {"steps": 3}, {"num_images_per_prompt": 2, "generator": None}, {})
    made = [digest(image(pipe, **size)) for size in sizes]
    session_of(pipe).detach()
    return [made[0], made[-1], *made[1:-1]]


def idle() -> bool:
    """Ranks that nobody calls for longer than the timeout, and that are called one after the other, go on."""
    pipe = otil_xdit.parallelize(pipeline(), config=OtilConfig(timeout=1.0))
    before = image(pipe)
    time.sleep(1.5 + 0.5 * dist.get_rank())
    same = torch.equal(image(pipe), before)
    session_of(pipe).detach()
    return same


def noise() -> list[str]:
    """Without a generator ranks draw alike, though their generators have been seeded apart, and anew each time."""
    pipe = otil_xdit.parallelize(pipeline(), config=OtilConfig(freshness="sync"))
    torch.manual_seed(dist.get_rank())
    made = [digest(image(pipe, generator=None, steps=2)) for _ in range(2)]
    session_of(pipe).detach()
    return made


def interrupted() -> bool:
    """After an exception in a callback the next image is as if nothing had happened."""
    pipe = otil_xdit.parallelize(pipeline(), config=DISPLACED)
    before = image(pipe)

    def stop(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            raise InterruptedError
        return given

    try:
        image(pipe, rows=32, callback_on_step_end=stop)
    except InterruptedError:
        return torch.equal(image(pipe), before)
    return False


def shared_network() -> dict[str, bool]:
    """Two pipelines round one U-Net, in turns, with their own settings; errors over the latents' deviation."""
    first, second = pipeline(), None
    exact = image(first)
    second = otil_xdit.parallelize(pipeline(first.unet), config=OtilConfig(freshness="frozen"))
    first = otil_xdit.parallelize(first, config=OtilConfig(freshness="sync"))
    made = [image(pipe) for pipe in (first, second, first, second)]
    errors = [((latents - exact).abs().max() / exact.std()).item() for latents in made]
    session_of(first).detach()
    session_of(second).detach()
    return {
        "same again": torch.equal(made[0], made[2]) and torch.equal(made[1], made[3]),
        "sync exact": errors[0] <= 1e-4,
        "frozen not": errors[1] > 1e-2,
        "undone": torch.equal(image(first), exact),
    }


def undone() -> dict[str, bool]:
    """`detach` gives back the network and the pipeline as they were."""
    pipe = pipeline()
    before, names, classes = image(pipe), list(pipe.unet.state_dict()), [type(m) for m in pipe.unet.modules()]
    kind = type(pipe)
    otil_xdit.parallelize(pipe, config=DISPLACED)
    image(pipe)
    wrapped = not unwrapped_layers(pipe.unet) and list(pipe.unet.state_dict()) == names
    session_of(pipe).detach()
    restored = [type(m) for m in pipe.unet.modules()] == classes and type(pipe) is kind
    return {"wrapped": wrapped, "restored": restored, "same": torch.equal(image(pipe), before)}


def counted() -> dict[str, Any]:
    """Bytes of halo rows and moments as counted, and as they follow from the shapes that layers are given.

    Besides them what the public summary says before, after and when all is undone.
    """
    pipe, steps = pipeline(), 4
    expected = small_bytes(pipe)
    otil_xdit.parallelize(pipe, config=OtilConfig(ratio=0.5, warmup_steps=1))
    said = [otil_xdit.summary(pipe)]
    image(pipe, steps=steps)
    report = otil_xdit.report(pipe)
    assert report is not None, "it has been parallelized"
    said.append(otil_xdit.summary(pipe))
    otil_xdit.restore(pipe)
    said.append(otil_xdit.summary(pipe))
    buffers, steps = report.buffer_bytes, report.steps
    return {"counted": report.small_bytes_per_step, "expected": expected, "said": said, "made": [buffers, steps]}


def controlled() -> dict[str, Any]:
    """Error of an image with a ControlNet, what is said of it, and the bytes of a step with it and without."""
    pipe = pipeline()
    image(otil_xdit.parallelize(pipe, config=OtilConfig(freshness="sync")), steps=1)
    alone = kv_per_step(pipe)
    otil_xdit.restore(pipe)
    torch.manual_seed(4)
    net = ControlNetModel.from_unet(pipe.unet)
    for parameter in net.parameters():  # those that add to the U-Net begin with zeros
        torch.nn.init.normal_(parameter, std=0.05)
    parts = {**pipe.components, "controlnet": net, "requires_safety_checker": False}
    pipe = StableDiffusionControlNetPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    given = {"image": torch.rand(1, 3, 192, 128, generator=torch.Generator().manual_seed(5))}
    exact, classes = image(pipe, steps=2, **given), [type(module) for module in net.modules()]
    otil_xdit.parallelize(pipe, config=OtilConfig(freshness="sync"))
    error = ((image(pipe, steps=2, **given) - exact).abs().max() / exact.std()).item()
    said, controlled = otil_xdit.summary(pipe).splitlines(), kv_per_step(pipe)
    otil_xdit.restore(pipe)
    return {
        "error": error,
        "said": [line for line in said if "controlnet" in line],
        "kv": [alone, controlled],
        "restored": classes == [type(module) for module in net.modules()],
    }


def kv_per_step(pipe: Any) -> float:
    """Bytes of keys and values that this rank has sent in a step of the last image."""
    report = otil_xdit.report(pipe)
    return sum(report.sent_bytes["kv"].values()) / report.steps


def unequal() -> dict[str, Any]:
    """Error of an image of patches of unequal shares, the rows that a rank had, and what else shares could be."""
    pipe, rows = pipeline(), set()
    exact = image(pipe, steps=2)
    otil_xdit.parallelize(pipe, config=OtilConfig(freshness="sync"), patch_shares=(1, 2))
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, inputs: rows.add(inputs[0].shape[2]))
    error = ((image(pipe, steps=2) - exact).abs().max() / exact.std()).item()
    otil_xdit.restore(pipe)
    told = ""
    try:
        otil_xdit.parallelize(pipe, patch_shares=(1, 2, 3))
    except ValueError as refused:
        told = str(refused)
    return {"error": error, "rows": sorted(rows), "told": told}


def small_bytes(pipe: Any) -> int:
    """For this rank of two: one row of its map to each neighbour that a 3x3 convolution reads, 2 float32 a group."""

    def sent(module: nn.Module, x: torch.Tensor) -> int:
        batch, channels, _, width = x.shape
        return 4 * batch * (module.num_groups * 2 if isinstance(module, nn.GroupNorm) else channels * width)

    return summed_over_messages(pipe, sent)


def paired() -> dict[str, dict[str, float]]:
    """Messages of halo rows and moments in a synchronous step, and the error over the deviation, by network.

    `saved` are the messages that norms and convolutions would send by themselves, without those that were sent.
    """
    found = {}
    for name, changed in {"plain": plain, "LoRA": adapted, "LoRA of two": adapted_twice, "hooks": hooked}.items():
        pipe = pipeline()
        changed(pipe.unet)
        exact, alone = image(pipe, steps=2), small_messages(pipe)
        otil_xdit.parallelize(pipe, config=OtilConfig(freshness="sync", warmup_steps=1))
        error = ((image(pipe, steps=2) - exact).abs().max() / exact.std()).item()
        sent = session_of(pipe).report().messages
        session_of(pipe).detach()
        small = sum(sent[kind]["steady"] for kind in ("halo", "moments") if kind in sent)
        found[name] = {"error": error, "saved": alone - small}
    return found


def plain(unet: nn.Module) -> None:
    pass


def adapted(unet: nn.Module, name: str = "one") -> None:
    torch.manual_seed(5)
    targets = ["conv1", "conv2", "conv_out"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False), name)


def adapted_twice(unet: nn.Module) -> None:
    adapted(unet, "one")
    adapted(unet, "two")
    unet.set_adapters(["one", "two"], [0.7, 0.5])


def hooked(unet: nn.Module) -> None:
    """A hook between norm and convolution that changes what the convolution reads."""
    unet.mid_block.resnets[0].norm1.register_forward_hook(lambda module, inputs, output: output + 1)


def small_messages(pipe: Any) -> int:
    """Messages of this rank of two in a step in which every norm and every convolution asks by itself."""
    return summed_over_messages(pipe, lambda module, x: 1)


def summed_over_messages(pipe: Any, of: Callable[[nn.Module, torch.Tensor], int]) -> int:
    """Sum of ``of(layer, its input)`` over a step's norms and 3x3 convolutions that send something from this rank."""
    total = []

    def seen(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        # The lower rank needs a row of the upper one at any stride.
        if isinstance(module, nn.GroupNorm) or dist.get_rank() == 0 or module.stride[0] == 1:
            total.append(of(module, inputs[0]))

    spatial = [m for m in pipe.unet.modules() if isinstance(m, nn.GroupNorm) or getattr(m, "kernel_size", 0) == (3, 3)]
    handles = [module.register_forward_pre_hook(seen) for module in spatial]
    image(pipe, steps=1)
    for handle in handles:
        handle.remove()
    return sum(total)


if __name__ == "__main__":
    main()
