"""The layers of a U-Net on patches, without processes: another patch's rows come from the whole map."""

from __future__ import annotations

import copy
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from otil_xdit.dryrun.job import ParallelDegrees
from otil_xdit.dryrun.stand_ins import DryRunSession, unet_groups
from otil_xdit.method.grid import LevelGrid
from otil_xdit.networks.unet.context import LayerContext
from otil_xdit.networks.unet.conv import halo_rows
from otil_xdit.networks.unet.group_norm import moments_of
from otil_xdit.networks.unet.layers import is_wrapped, unwrap_layer, wrap_layer
from otil_xdit.networks.unet.model import PatchedUNet
from otil_xdit.networks.unet.text_cache import TextCache
from tests.support.communicators import WholeMapCommunicator

nobody: Any = SimpleNamespace(order=torch.zeros(1))


@cache
def empty_unet(levels: int) -> UNet2DConditionModel:
    """A network of so many resolutions, for what is read of it: none of its layers is called."""
    sizes = {"block_out_channels": (8,) * levels, "norm_num_groups": 4, "cross_attention_dim": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * levels, "up_block_types": ("UpBlock2D",) * levels}
    with torch.device("meta"):
        return UNet2DConditionModel(**sizes, **blocks, layers_per_block=1)


@torch.no_grad()
def on_patches(
    layer: nn.Module,
    whole: torch.Tensor,
    grid: LevelGrid,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> list[torch.Tensor]:
    """What each rank computes where a U-Net that is nothing but `layer` is called with the whole map."""
    ranks, parts = len(grid.rows[0]), []
    for rank in range(ranks):
        patched = copy.deepcopy(layer)
        fake = WholeMapCommunicator(whole, grid.slice_of(0, rank), ranks, rank)
        groups = unet_groups(ParallelDegrees(patches=ranks), rank)
        unet = PatchedUNet(DryRunSession(fake), empty_unet(len(grid.rows)), groups, nobody)
        wrap_layer(patched, LayerContext(unet, "layer", 0))

        def call(latent: torch.Tensor, patched: nn.Module = patched) -> tuple[torch.Tensor]:
            parts.append(patched(latent.contiguous(memory_format=memory_format)))
            return (latent,)

        unet.forward(call, whole)
    return parts


@settings(deadline=None, max_examples=150)
@given(
    kernel=st.sampled_from([(1, 3), (3, 1), (3, 3), (3, 5), (5, 3), (5, 5)]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2]),
    height=st.integers(4, 40),
    width=st.integers(9, 12),
    ranks=st.integers(1, 4),
)
def test_convolutions(kernel: tuple[int, int], stride: int, dilation: int, height: int, width: int, ranks: int) -> None:
    padding = tuple(dilation * (side - 1) // 2 for side in kernel)
    levels = stride  # a map that is halved once has two levels
    assume(-(-height // 2 ** (levels - 1)) >= ranks)
    grid = LevelGrid.build(height, width, levels, ranks)
    torch.manual_seed(height)
    conv = nn.Conv2d(2, 3, kernel, stride, padding, dilation)
    assume(max(halo_rows(conv)) <= min(grid.rows[0]))
    whole = torch.randn(1, 2, height, width)
    parts = on_patches(conv, whole, grid)
    exact = conv(whole)
    assert [part.shape[2] for part in parts] == list(grid.rows[-1]) or height == 1
    assert torch.allclose(torch.cat(parts, dim=2), exact, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "rows"),
    [(3, 1, 1, (1, 1)), (3, 2, 1, (1, 0)), (1, 1, 0, (0, 0)), (5, 1, 2, (2, 2))],
)
def test_no_more_rows_are_asked_for_than_are_read(
    kernel: int, stride: int, padding: int, rows: tuple[int, int]
) -> None:
    assert halo_rows(nn.Conv2d(1, 1, kernel, stride, padding)) == rows


@settings(deadline=None)
@given(height=st.integers(2, 20), ranks=st.integers(1, 3), affine=st.booleans(), offset=st.sampled_from([0.0, 30.0]))
def test_group_norm(height: int, ranks: int, affine: bool, offset: float) -> None:
    assume(height >= ranks)
    grid = LevelGrid.build(height, 7, 1, ranks)
    torch.manual_seed(height)
    norm = nn.GroupNorm(4, 8, eps=0.01, affine=affine)
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    whole = torch.randn(2, 8, height, 7) + offset
    parts = on_patches(norm, whole, grid)
    assert torch.allclose(torch.cat(parts, dim=2), norm(whole), atol=1e-4 if offset else 1e-5)


def test_moments_are_of_all_numbers_of_a_group_and_biased() -> None:
    x = torch.randn(2, 8, 2, 3, generator=torch.Generator().manual_seed(0))
    var, mean = torch.var_mean(x.unflatten(1, (4, 2)), dim=(2, 3, 4), correction=0)
    for found, expected in zip(moments_of(x, 4), (mean, var), strict=True):
        torch.testing.assert_close(found, expected)


def test_half_precision_keeps_its_type_and_takes_moments_in_float32() -> None:
    norm, grid = nn.GroupNorm(4, 8).bfloat16(), LevelGrid.build(4, 7, 1, 2)
    whole = (torch.randn(2, 8, 4, 7) + 5).bfloat16()
    seen = torch.cat(on_patches(norm, whole, grid), dim=2)
    assert seen.dtype == torch.bfloat16
    assert torch.allclose(seen.float(), norm(whole).float(), atol=0.05)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_group_norm_keeps_the_memory_format(batch: int) -> None:
    """A card's tensor cores want channels last; copies there and back would cost more than the norm."""
    norm, whole, grid = nn.GroupNorm(4, 8), torch.randn(batch, 8, 6, 5), LevelGrid.build(6, 5, 1, 2)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    plain, last = on_patches(norm, whole, grid), on_patches(norm, whole, grid, torch.channels_last)
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in last)
    assert all(map(torch.equal, plain, last))


def test_a_layer_stays_what_it_was() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1)
    weight, names = conv.weight, list(conv.state_dict())
    wrap_layer(conv, LayerContext(nobody, "conv", 0))
    assert isinstance(conv, nn.Conv2d) and type(conv).__name__ == "Conv2d" and is_wrapped(conv)
    assert conv.weight is weight and list(conv.state_dict()) == names
    conv.to(torch.float64).requires_grad_(False)
    unwrap_layer(conv)
    assert type(conv) is nn.Conv2d and not is_wrapped(conv)
    unwrap_layer(conv)


class _Scaled(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "layer, message",
    [
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "circular"),
        (nn.Conv2d(2, 2, 3, padding="same"), "'same'"),
        (nn.Conv2d(2, 2, 3, stride=3), "stride"),
        (_Scaled(2, 2, 3), "_Scaled"),
    ],
)
def test_layers_that_would_be_wrong_are_refused_by_name(layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=f"layer mid.*{message}|{message}.*layer mid"):
        wrap_layer(layer, LayerContext(nobody, "mid", 0))
    assert not is_wrapped(layer)


def test_unknown_attention_processors_are_refused_by_name() -> None:
    class Perturbed:
        def __call__(self, *args: Any, **kwargs: Any) -> None: ...

    attention = Attention(query_dim=8, heads=2, dim_head=4)
    attention.set_processor(Perturbed())
    with pytest.raises(ValueError, match="Perturbed"):
        wrap_layer(attention, LayerContext(nobody, "attn1", 0))


def test_text_is_projected_once_and_again_when_anything_changes() -> None:
    cache, layer, calls = TextCache(), nn.Linear(4, 4), []
    text = torch.randn(1, 3, 4)

    def project() -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        return layer(text), layer(text)

    def seen(name: str = "a", states: torch.Tensor = text) -> int:
        before = len(calls)
        with torch.no_grad():
            cache.get(name, states, (layer,), project)
        return len(calls) - before

    assert [seen(), seen(), seen("b"), seen("b")] == [1, 0, 1, 0]
    assert seen(states=text.clone()) == 1
    seen()
    text.add_(1)
    assert [seen(), seen()] == [1, 0]
    with torch.no_grad():
        layer.weight.mul_(2)
    assert [seen(), seen()] == [1, 0]
    layer.to(torch.float64).to(torch.float32)
    assert seen() == 1
    layer.scaling = {"style": 0.5}
    assert [seen(), seen()] == [1, 0]
    layer.scaling["style"] = 0.7
    assert seen() == 1
    cache.clear()
    assert seen() == 1
