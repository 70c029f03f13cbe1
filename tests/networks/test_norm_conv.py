"""Which norms and convolutions are taken together, and for which call a convolution is handed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from torch import nn

from otil_xdit.exchange.halo import halo_key
from otil_xdit.networks.unet.norm_conv import NormConvPair, PrefetchedHalo, find_norm_conv_pairs
from tests.support.unets.configs import build_unet


def pairs_of(**settings: Any) -> dict[str, NormConvPair]:
    """The pairs of a network that is one residual block."""
    return find_norm_conv_pairs(nn.ModuleDict({"block": ResnetBlock2D(**{"in_channels": 8, "groups": 4, **settings})}))


def test_every_residual_block_has_two_and_the_output_one() -> None:
    pairs = find_norm_conv_pairs(build_unet("sd1.5"))
    assert len(pairs) == 2 * 22 + 1
    assert all(pair.is_intact() for pair in pairs.values())
    assert pairs["conv_norm_out"].conv_name == "conv_out"
    assert pairs["mid_block.resnets.1.norm2"].conv_name == "mid_block.resnets.1.conv2"
    assert not any("attentions" in name for name in pairs), "a transformer's norm is followed by a 1x1 projection"


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, {"block.norm1", "block.norm2"}),
        ({"time_embedding_norm": "scale_shift"}, {"block.norm1"}),
        ({"up": True}, {"block.norm2"}),
        ({"down": True}, {"block.norm2"}),
    ],
)
def test_only_what_is_understood_is_paired(settings: dict[str, Any], expected: set[str]) -> None:
    assert set(pairs_of(**settings)) == expected


def test_other_computations_are_not_paired() -> None:
    class Doubled(ResnetBlock2D):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return 2 * super().forward(*args, **kwargs)

    class Held(nn.Module):
        def __init__(self, layer: nn.Conv2d) -> None:
            super().__init__()
            self.base_layer = layer

    block = ResnetBlock2D(in_channels=8, groups=4)
    block.conv1 = Held(block.conv1)
    block.conv2 = nn.Conv2d(8, 8, 1)
    assert not find_norm_conv_pairs(nn.ModuleDict({"block": block, "other": Doubled(in_channels=8, groups=4)}))
    block = ResnetBlock2D(in_channels=8, groups=4)
    block.nonlinearity = nn.Softmax(dim=1)
    assert not find_norm_conv_pairs(nn.ModuleDict({"block": block}))


def test_active_dropout_and_hooks_part_a_pair() -> None:
    pairs = pairs_of(dropout=0.1)
    first, second = pairs["block.norm1"], pairs["block.norm2"]
    assert first.is_intact() and not second.is_intact()
    assert second.dropout is not None
    second.dropout.eval()
    assert second.is_intact()
    for place, register in (
        (second.norm, "register_forward_hook"),
        (second.dropout, "register_forward_pre_hook"),
        (second.activation, "register_forward_hook"),
        (second.reader, "register_forward_pre_hook"),
    ):
        handle = getattr(place, register)(lambda *seen: None)
        assert not second.is_intact(), place
        handle.remove()
        assert second.is_intact()


def rows_for(pair: NormConvPair, x: torch.Tensor) -> PrefetchedHalo:
    return PrefetchedHalo(pair, (None, x[:, :, :1]), halo_key(x, 1, 1))


def test_rows_are_for_one_call() -> None:
    (pair, _), x = pairs_of().values(), torch.randn(2, 8, 4, 5)
    rows = rows_for(pair, x)
    assert rows.rows_for("block.conv2", x, 1, 1) is None
    assert rows.rows_for("block.conv1", x[:1], 1, 1) is None, "another map"
    assert rows.rows_for("block.conv1", x.double(), 1, 1) is None, "another type"
    assert rows.rows_for("block.conv1", x, 2, 1) is None, "another number of rows"
    assert not rows.is_consumed
    assert rows.rows_for("block.conv1", x, 1, 1) is rows.rows
    assert rows.is_consumed


def test_adapters_read_the_rows_of_what_they_adapt() -> None:
    unet = build_unet("sd1.5")
    unet.add_adapter(LoraConfig(r=2, target_modules=["conv1"]))
    pairs = find_norm_conv_pairs(unet)
    assert len(pairs) == 2 * 22 + 1
    name = "mid_block.resnets.0.conv1"
    rows, x = rows_for(pairs["mid_block.resnets.0.norm1"], torch.randn(2, 64, 4, 5)), torch.randn(2, 64, 4, 5)
    assert rows.rows_for(f"{name}.lora_A.default", x, 1, 1) is None, "not before the convolution itself"
    assert rows.rows_for(f"{name}.base_layer", x, 1, 1) is rows.rows
    assert rows.rows_for(f"{name}.lora_A.default", x, 1, 1) is rows.rows
    assert rows.rows_for(f"{name}.lora_A.default", x.clone(), 1, 1) is None, "the adapter's input may have dropout"
    assert rows.rows_for("mid_block.resnets.0.conv2", x, 1, 1) is None
