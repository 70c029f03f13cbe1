"""The published SD1.5 and SDXL U-Nets: nothing of them is left unwrapped, and a step of the first is exact."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from otil_xdit.dryrun.job import ParallelDegrees
from otil_xdit.dryrun.stand_ins import DryRunSession, unet_groups
from otil_xdit.networks.unet.layers import unwrapped_layers
from otil_xdit.networks.unet.model import PatchedUNet
from tests.support.communicators import FakeCommunicator
from tests.support.dits.case import Degrees
from tests.support.torchrun import lines_of
from tests.support.unets import REAL, Trial

PARAMETERS = {"real sd1.5": 859_520_964, "real sdxl": 2_567_463_684}
"""As published."""

LAYERS = {
    # SD1.5: four levels. 22 residual blocks: 4 x 2 down, 2 in the middle, 4 x 3 up. 16 transformers: 3 x 2 + 1 + 3 x 3.
    # Convolutions: 2 a residual block, in and out, 3 down, 3 up. Norms: 2 a residual block, 1 a transformer, the last.
    "real sd1.5": {"convolution": 2 * 22 + 2 + 6, "group norm": 2 * 22 + 16 + 1, "self-attention": 16},
    # SDXL: three levels, 17 residual blocks; 2 x 2 + 1 + 2 x 3 transformers; of 2 layers on the middle level (2 down,
    # 3 up) and of 10 on the lowest (2 down, 1 in the middle, 3 up).
    "real sdxl": {"convolution": 2 * 17 + 2 + 4, "group norm": 2 * 17 + 11 + 1, "self-attention": 2 * 5 + 10 * 6},
}
TOLERANCE = 1e-4


def empty_unet(name: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**REAL[name])


def patches_of(unet: UNet2DConditionModel) -> PatchedUNet:
    """Ready to wrap; wrapping shows layouts to the communicator, and asks no process group for anything."""
    nobody: Any = None
    return PatchedUNet(DryRunSession(FakeCommunicator()), unet, unet_groups(ParallelDegrees(patches=2), 0), nobody)


def kind_of(name: str, module: nn.Module) -> str | None:
    """What kind of layer that looks beyond a patch this is; found without asking the package."""
    if isinstance(module, nn.Conv2d):
        return "convolution" if module.kernel_size != (1, 1) else None
    if isinstance(module, Attention):
        return "self-attention" if name.endswith("attn1") else None
    return "group norm" if isinstance(module, nn.GroupNorm) else None


def layers(unet: UNet2DConditionModel) -> dict[str, list[nn.Module]]:
    found: dict[str, list[nn.Module]] = {}
    for name, module in unet.named_modules():
        kind = kind_of(name, module)
        if kind is not None:
            found.setdefault(kind, []).append(module)
    return found


@pytest.mark.parametrize("name", REAL)
def test_it_is_the_published_network(name: str) -> None:
    assert sum(parameter.numel() for parameter in empty_unet(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", REAL)
def test_every_layer_that_looks_beyond_a_patch_is_wrapped(name: str) -> None:
    unet = empty_unet(name)
    own = {kind: {type(module) for module in modules} for kind, modules in layers(unet).items()}
    assert own == {"convolution": {nn.Conv2d}, "group norm": {nn.GroupNorm}, "self-attention": {Attention}}
    patches_of(unet).prepare()
    assert unwrapped_layers(unet) == []
    wrapped = Counter({kind: sum(type(one) not in own[kind] for one in ones) for kind, ones in layers(unet).items()})
    assert wrapped == LAYERS[name]


@pytest.mark.parametrize("name", REAL)
def test_names_of_parameters_stay_and_all_comes_back(name: str) -> None:
    unet = empty_unet(name)
    names, kinds = list(unet.state_dict()), [type(module) for module in unet.modules()]
    patches = patches_of(unet)
    patches.prepare()
    assert list(unet.state_dict()) == names
    patches.release()
    assert [type(module) for module in unet.modules()] == kinds
    assert len(unwrapped_layers(unet)) == sum(LAYERS[name].values()) + LAYERS[name]["self-attention"]


@pytest.mark.slow
def test_a_step_of_the_real_size_is_exact() -> None:
    trial = Trial("real sd1.5", Degrees(patch=2), 16, 16, batch=2)
    line, *_ = lines_of(2, "unet_exactness.py", str(trial), timeout=900)
    assert line["stopped"] is None
    assert line["max_abs_error"] <= TOLERANCE, line
