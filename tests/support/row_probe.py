"""Finds what of a U-Net mixes rows outside the layers that patches wrap; no list of operators, so none is forgotten.

Some rows of the latent are NaN. Layers that are wrapped on patches are made to keep NaN in its rows, as they are the
ones that may look further. Whatever else reads another row, by a convolution, a sum, a roll, a transform, a sort,
spreads NaN to rows that had none, or takes it from those that had. A row of a coarser level stands for aligned rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

from otil_xdit.networks.handles import make_order
from otil_xdit.networks.unet.context import LayerContext, LayerExchange
from otil_xdit.networks.unet.layers import is_spatial, unwrap_layer, wrap_layer
from otil_xdit.networks.unet.text_cache import TextCache

NAN = float("nan")


@torch.no_grad()
def leaks(network: nn.Module, call: Callable[[torch.Tensor], torch.Tensor], sample: torch.Tensor, block: int) -> str:
    """Return the first module whose output has NaN in other rows than it should; empty where there is none.

    Args:
        network: a U-Net; as it is on one device.
        call: calls it (or what uses it) with a latent, [1, C, H, W], and returns what is of the same rows.
        sample: that latent.
        block: rows of the latent that become NaN: as many as one row of the coarsest level stands for.
    """
    whole = sample.shape[-2]
    start = whole // 2 // block * block
    spoilt = sample.clone()
    spoilt[:, :, start : start + block] = NAN
    found: list[str] = []
    names = {module: path for path, module in network.named_modules()}

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if (
            not found
            and module in names
            and isinstance(output, torch.Tensor)
            and not _is_right(output, sample, start, block)
        ):
            found.append(f"{names[module]} ({type(module).__module__}.{type(module).__name__})")

    with _keeping_rows(network), _CarryingNaN():
        assert torch.isfinite(call(sample)).all(), "the network gives NaN by itself"
        handle = register_module_forward_hook(look)
        try:
            made = call(spoilt)
        finally:
            handle.remove()
    if not found and not _is_right(made, sample, start, block):
        found.append(f"{type(network).__name__} itself")
    return found[0] if found else ""


def _is_right(output: torch.Tensor, sample: torch.Tensor, start: int, block: int) -> bool:
    """Tell whether NaN of a map, [B, C, h, w], or of tokens, [B, h * w, C], is in its rows; others are not judged."""
    (height, width), batch = sample.shape[-2:], sample.shape[0]
    if output.shape[0] % batch:
        return True
    for factor in (1, 2, 4, 8):
        h, w = height // factor, width // factor
        if output.ndim == 4 and output.shape[-2:] == (h, w):
            rows = output.isnan().flatten(-1).any(-1).any(1).any(0)
        elif output.ndim == 3 and output.shape[1] == h * w:
            rows = output.unflatten(1, (h, w)).isnan().any(-1).any(-1).any(0)
        else:
            continue
        expected = torch.zeros(h, dtype=torch.bool)
        expected[start // factor : max((start + block) // factor, start // factor + 1)] = True
        return bool((rows == expected).all())
    return True


@contextmanager
def _keeping_rows(network: nn.Module) -> Iterator[None]:
    """Let the layers that patches wrap keep NaN in its rows; attention is the wrapped one, which asks for the keys."""
    exchange, text_cache = cast(LayerExchange, _Attending()), TextCache()
    layers = {path: module for path, module in network.named_modules() if is_spatial(module)}
    for path, layer in layers.items():
        if isinstance(layer, Attention):
            wrap_layer(layer, LayerContext(exchange, path, 0, text_cache=text_cache))
        else:
            vars(layer)["forward"] = _kept(layer)
    try:
        yield
    finally:
        for layer in layers.values():
            unwrap_layer(layer)
            vars(layer).pop("forward", None)


class _CarryingNaN(TorchFunctionMode):
    """Lets torch's attention give NaN for a query that is, and for all where a key is: kernels may give zeros."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key, value, *others = args
        made = function(*map(torch.nan_to_num, (query, key, value)), *others, **(kwargs or {}))
        is_mixed = (key.isnan().any() | value.isnan().any()).item()
        return made.masked_fill(query.isnan().any(-1, keepdim=True) | is_mixed, NAN)


class _Attending:
    """What wrapped attention asks."""

    running = True

    def __init__(self) -> None:
        self.order = make_order()

    def attend(self, context: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend as if no query, key or value were NaN, to a result that is where a query, key or value was."""
        known = (torch.nan_to_num(one) for one in (query, key, value))
        spoilt = (query + key + value).isnan().any(-1, keepdim=True).any(1, keepdim=True)
        return functional.scaled_dot_product_attention(*known).masked_fill(spoilt, NAN)


def _kept(layer: nn.Module) -> Callable[..., torch.Tensor]:
    plain = layer.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = plain(torch.nan_to_num(x), *args, **kwargs)
        # Of a map its rows; inside attention a norm is given tokens, [B, C, S].
        dim = -2 if x.ndim == 4 else 2
        others = [at for at in range(x.ndim) if at != dim % x.ndim]
        spoilt = x.isnan().amax(others)
        if made.shape[dim] < len(spoilt):
            spoilt = spoilt.unflatten(0, (made.shape[dim], -1)).amax(1)
        shape = [1] * made.ndim
        shape[dim] = -1
        return made.masked_fill(spoilt.view(shape), NAN)

    return forward
