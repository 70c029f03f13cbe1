"""What changes a network after `parallelize`, or before it, is refused by name on all ranks, or changes nothing."""

from __future__ import annotations

import time
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from otil_xdit.networks.compatibility import ModuleInspector
from tests.support.torchrun import lines_of
from tests.support.unets.configs import build_unet

UNET = {
    "set_attn_processor": "attention processor __main__.OwnProcessor",
    "a layer's processor": "attention processor __main__.OwnProcessor",
    "a processor of a known name": "ip_adapter.attention_processor.AttnProcessor2_0",
    "PAG's processor": "PAGIdentitySelfAttnProcessor2_0",
    "FreeU": "disable_freeu",
    "forward of a block": "unet.mid_block.attentions.0.transformer_blocks.0",
    "forward of the network": "pipeline's unet (UNet2DConditionModel)",
    "token merging": "tomesd.patch",
    "forward of a class": "hypertile",
    "a hook of diffusers": "fbc_leader_block_hook",
    "CPU offload": "AlignDevicesHook",
    "model offload": None,
    "dropout": "p = 0.1",
    "quantised": "torch.ao",
    "step of the scheduler": "DDIMScheduler whose step has been replaced",
    "gradients": "no_grad",
    "latents of one rank changed": "changed the latents at other steps",
    "latents changed apart": "made other latents on one rank",
}
IN_AN_IMAGE = ("gradients", "latents of one rank changed", "latents changed apart")
DIT = {
    "set_attn_processor": "now is OwnJointProcessor",
    "a layer's processor": "now is OwnJointProcessor",
    "pyramid attention broadcast": "pyramid_attention_broadcast",
    "a hook of diffusers": "faster_cache_block",
    "xDiT's cache": "the step cache FBCachedTransformerBlocks(rel_l1_thresh=0.6, num_steps=2)",
    "forward of a block": "transformer_blocks.1 (JointTransformerBlock)",
    "token merging": "tomesd.patch",
    "dropout": "p = 0.1",
    "quantised": "torch.ao",
    "an argument that xDiT does not read": "skip_guidance_layers",
    "CPU offload": None,
    "a hook that casts weights": None,
}
BEFORE = {
    "unet": {name: UNET[name] for name in ("set_attn_processor", "forward of a block", "token merging", "CPU offload")},
    "dit": {
        **{name: DIT[name] for name in ("pyramid attention broadcast", "forward of a block", "token merging")},
        "set_attn_processor": "attention processor OwnJointProcessor",
    },
}


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], list[dict[str, Any]]]:
    return {(line["kind"], line["deed"]): line["ranks"] for line in lines_of(2, "compatibility.py")}


@pytest.mark.parametrize(("kind", "expected"), [("unet", UNET), ("dit", DIT)])
def test_between_two_images(
    kind: str, expected: dict[str, str | None], found: dict[tuple[str, str], list[dict[str, Any]]]
) -> None:
    for deed, told in expected.items():
        ranks = found[kind, deed]
        assert all(rank["same"] for rank in ranks), (deed, ranks)
        if told is None:
            assert all(rank["refused"] is None and rank["sent"] for rank in ranks), (deed, ranks)
            continue
        assert all(told in (rank["refused"] or "") for rank in ranks), (deed, ranks)
        # Callbacks are called in the middle of an image.
        assert deed in IN_AN_IMAGE or not any(rank["sent"] for rank in ranks), (deed, ranks)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_before_parallelize(kind: str, found: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    for deed, told in BEFORE[kind].items():
        ranks = found[kind, f"{deed}, before"]
        assert all(told in (rank["refused"] or "") for rank in ranks), (deed, ranks)


def test_a_look_at_sdxl_takes_no_time() -> None:
    """Its layers without weights; each time next to torch's own walk of them, as others use this machine too."""
    with torch.device("meta"):
        network = diffusers.UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
        )
    look = ModuleInspector("unet", network, patched=True)
    ratios = []
    for _ in range(10):
        started = time.perf_counter()
        look.check()
        between = time.perf_counter()
        dict(network.named_modules())
        ratios.append((between - started) / (time.perf_counter() - between))
    assert min(ratios) < 3, ratios


class Doubled(nn.Linear):
    """A layer from elsewhere: this file is of no known package."""


def test_layers_from_elsewhere_are_named_and_those_of_the_networks_own_package_are_not() -> None:
    network = build_unet("sd1.5")
    network.time_embedding.linear_1 = Doubled(32, 128)
    with pytest.raises(ValueError, match=r"unet\.time_embedding\.linear_1 \(Doubled\).*test_compatibility"):
        ModuleInspector("unet", network, patched=True).check()
    own = nn.Sequential(Doubled(2, 2))
    own.__class__ = type("Own", (nn.Sequential,), {"__module__": Doubled.__module__})
    ModuleInspector("unet", own, patched=False).check()


def test_a_forward_that_hooks_left_behind_is_the_layers_own() -> None:
    """accelerate and diffusers set a layer's own method on it when their hooks go."""
    block = nn.Sequential(nn.Linear(2, 2))
    block[0].forward = block[0].forward
    ModuleInspector("transformer", block, patched=False).check()
    with pytest.raises(ValueError, match="has been replaced"):
        ModuleInspector("unet", block, patched=True).check()
