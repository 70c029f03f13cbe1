"""The layers of a U-Net on patches, without processes: another patch's rows come from the whole map."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from otil_xdit.method.grid import LevelGrid
from otil_xdit.networks.unet.context import LayerContext
from otil_xdit.networks.unet.conv import halo_rows
from otil_xdit.networks.unet.layers import is_wrapped, unwrap_layer, wrap_layer
from otil_xdit.networks.unet.text_cache import TextCache


class OnePatch:
    """Stand in for `PatchedUNet`: one rank of a map that is known as a whole."""

    running = True

    def __init__(self, whole: torch.Tensor, grid: LevelGrid, rank: int) -> None:
        self.whole, self.rows = whole, grid.slice_of(0, rank)
        self.is_last = rank == len(grid.rows[0]) - 1
        self.text_cache = TextCache()

    def prefetched_halo(self, context: Any, x: torch.Tensor, above: int, below: int) -> None:
        return None

    def halo(self, context: Any, x: torch.Tensor, above: int, below: int, precomputed: Any) -> torch.Tensor:
        padded = nn.functional.pad(self.whole, (0, 0, above, below))
        return padded[:, :, self.rows.start : self.rows.stop + above + below]

    def moments(self, context: Any, mean: torch.Tensor, var: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = self.whole.unflatten(1, (mean.shape[1], -1)).float()
        whole_var, whole_mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0)
        return whole_mean, whole_var


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
    parts = []
    for rank in range(ranks):
        patched = copy.deepcopy(conv)
        wrap_layer(patched, LayerContext(OnePatch(whole, grid, rank), "conv", 0))
        parts.append(patched(whole[:, :, grid.slice_of(0, rank)]))
    exact = conv(whole)
    assert [part.shape[2] for part in parts] == list(grid.rows[-1]) or height == 1
    assert torch.allclose(torch.cat(parts, dim=2), exact, atol=1e-5)


@settings(deadline=None)
@given(height=st.integers(2, 20), ranks=st.integers(1, 3), affine=st.booleans(), offset=st.sampled_from([0.0, 30.0]))
def test_group_norm(height: int, ranks: int, affine: bool, offset: float) -> None:
    assume(height >= ranks)
    grid = LevelGrid.build(height, 7, 1, ranks)
    torch.manual_seed(height)
    norm = nn.GroupNorm(4, 8, affine=affine)
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    whole = torch.randn(2, 8, height, 7) + offset
    parts = []
    for rank in range(ranks):
        patched = copy.deepcopy(norm)
        wrap_layer(patched, LayerContext(OnePatch(whole, grid, rank), "norm", 0))
        parts.append(patched(whole[:, :, grid.slice_of(0, rank)]))
    assert torch.allclose(torch.cat(parts, dim=2), norm(whole), atol=1e-4 if offset else 1e-5)


def test_half_precision_keeps_its_type_and_takes_moments_in_float32() -> None:
    norm, grid = nn.GroupNorm(4, 8).bfloat16(), LevelGrid.build(4, 7, 1, 1)
    whole = (torch.randn(2, 8, 4, 7) + 5).bfloat16()
    exact = norm(whole)
    wrap_layer(norm, LayerContext(OnePatch(whole, grid, 0), "norm", 0))
    assert norm(whole).dtype == torch.bfloat16
    assert torch.allclose(norm(whole).float(), exact.float(), atol=0.05)


def test_a_layer_stays_what_it_was() -> None:
    conv, grid = nn.Conv2d(2, 3, 3, padding=1), LevelGrid.build(4, 4, 1, 1)
    weight, names = conv.weight, list(conv.state_dict())
    wrap_layer(conv, LayerContext(OnePatch(torch.randn(1, 2, 4, 4), grid, 0), "conv", 0))
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
        wrap_layer(layer, LayerContext(None, "mid", 0))
    assert not is_wrapped(layer)


def test_unknown_attention_processors_are_refused_by_name() -> None:
    class Perturbed:
        def __call__(self, *args: Any, **kwargs: Any) -> None: ...

    attention = Attention(query_dim=8, heads=2, dim_head=4)
    attention.set_processor(Perturbed())
    with pytest.raises(ValueError, match="Perturbed"):
        wrap_layer(attention, LayerContext(None, "attn1", 0))


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
