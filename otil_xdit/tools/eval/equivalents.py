"""Equivalent networks: the same function, with the channels of its keys and values scaled or rotated.

Attention does not change when keys are multiplied by a matrix A and queries by its inverse transpose, nor when values
are multiplied by A and the output projection by its inverse. So a network has many equivalents that draw the same
image, and those that are published have channels far less even than the ones that ship here. What compares or codes
keys and values should do as well on all of them.

Shapes: H heads, d features of a head, C = H * d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Change = Callable[[int, int, torch.Generator], torch.Tensor]
"""Makes the matrices of all heads, float64 [H, d, d], from H, d and a source of chance."""

OUTLIER_SHARE = 32
"""One channel in so many is an outlier."""


def _log_normal(sigma: float) -> Change:
    """Scale each channel by a log-normal number."""
    return lambda heads, size, chance: torch.diag_embed((sigma * _normal((heads, size), chance)).exp())


def _outliers(factor: float) -> Change:
    """Multiply one channel in `OUTLIER_SHARE` by `factor`, of all heads together and one at least."""

    def change(heads: int, size: int, chance: torch.Generator) -> torch.Tensor:
        scales = torch.ones(heads * size, dtype=torch.float64)
        chosen = torch.randperm(heads * size, generator=chance)[: max(1, heads * size // OUTLIER_SHARE)]
        scales[chosen] = factor
        return torch.diag_embed(scales.view(heads, size))

    return change


def _heads(factor: float) -> Change:
    """Scale whole heads, the first by 1 and the last by `factor`, those between in equal ratios."""

    def change(heads: int, size: int, chance: torch.Generator) -> torch.Tensor:
        scales = torch.logspace(0, 1, heads, base=factor, dtype=torch.float64)
        return torch.diag_embed(scales[:, None].expand(heads, size))

    return change


def _rotated(sigma: float) -> Change:
    """Scale each channel by a log-normal number, then rotate inside each head."""

    def change(heads: int, size: int, chance: torch.Generator) -> torch.Tensor:
        rotation = torch.linalg.qr(_normal((heads, size, size), chance)).Q
        return rotation @ _log_normal(sigma)(heads, size, chance)

    return change


def _reordered(seed: float) -> Change:
    """Put the channels of each head in another order, which changes nothing but the order of sums."""

    def change(heads: int, size: int, chance: torch.Generator) -> torch.Tensor:
        orders = torch.Generator().manual_seed(int(seed))
        rows = [torch.eye(size, dtype=torch.float64)[torch.randperm(size, generator=orders)] for _ in range(heads)]
        return torch.stack(rows)

    return change


def _normal(shape: tuple[int, ...], chance: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=chance, dtype=torch.float64)


CHANGES: dict[str, Callable[[float], Change]] = {
    "log-normal": _log_normal,
    "outliers": _outliers,
    "heads": _heads,
    "rotated": _rotated,
    "reordered": _reordered,
}
"""Kinds of change by name, each with one number: a sigma, a factor or a seed."""


@dataclass(frozen=True)
class Equivalent:
    """A change of a network that does not change its function.

    Attributes:
        text: as the user wrote it.
        change: makes the matrices.
    """

    text: str
    change: Change

    @torch.no_grad()
    def apply(self, network: nn.Module, seed: int = 0) -> None:
        """Change the self-attention of a network in place: a U-Net's, an SD3's or a Flux transformer's.

        Keys that are normalised take only scales, the same in all heads, and with rotary embeddings the same for both
        channels of a pair; see `_diagonal`.

        Raises:
            ValueError: for a network without self-attention that is known here.
        """
        chance = torch.Generator().manual_seed(seed)
        sites = list(_sites(network))
        if not sites:
            raise ValueError(f"{type(network).__name__} has no self-attention that an equivalent is known of")
        for site in sites:
            # A norm's weight is the same for all heads.
            site.change_keys(self.change(1 if site.key_norms else site.heads, site.size, chance))
            site.change_values(self.change(site.heads, site.size, chance))


def parse_equivalent(text: str) -> Equivalent:
    """Read ``KIND:NUMBER``, say ``outliers:32``.

    Raises:
        ValueError: naming what is accepted.
    """
    kind, _, number = text.partition(":")
    if kind not in CHANGES:
        raise ValueError(f"--variant {text}: {kind!r} is not a change; choose from {', '.join(CHANGES)}")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf") or (value == 0 and kind in ("outliers", "heads")):
        raise ValueError(f"--variant {text}: give a positive number after a colon, say {kind}:2")
    return Equivalent(text, CHANGES[kind](value))


@dataclass(frozen=True)
class _Site:
    """One self-attention: the layers that make queries, keys and values, and those that read what it returns.

    Attributes:
        heads, size: H and d.
        queries, keys, values: layers with C outputs.
        outputs: layers whose first C inputs are attention's output.
        query_norms, key_norms: norms with a weight of d behind queries and keys; empty where there is none.
        rotary: whether queries and keys are rotated by pairs behind the norms.
    """

    heads: int
    size: int
    queries: list[nn.Linear]
    keys: list[nn.Linear]
    values: list[nn.Linear]
    outputs: list[nn.Linear]
    query_norms: list[Any]
    key_norms: list[Any]
    rotary: bool

    def change_keys(self, matrices: torch.Tensor) -> None:
        """Multiply keys by matrices, [H, d, d], as far as they commute with what follows, and queries to match."""
        if self.key_norms:
            scales = _diagonal(matrices, self.rotary)
            for norm in self.key_norms:
                norm.weight.mul_(scales)
            for norm in self.query_norms:
                norm.weight.div_(scales)
            return
        for layer in self.keys:
            _multiply_outputs(layer, matrices)
        for layer in self.queries:
            _multiply_outputs(layer, torch.linalg.inv(matrices).mT)

    def change_values(self, matrices: torch.Tensor) -> None:
        """Multiply values by matrices, [H, d, d], and what reads them by their inverses."""
        for layer in self.values:
            _multiply_outputs(layer, matrices)
        for layer in self.outputs:
            _multiply_inputs(layer, torch.linalg.inv(matrices))


def _diagonal(matrices: torch.Tensor, rotary: bool) -> torch.Tensor:
    """Return the scales of the channels, [d], of a matrix, [1, d, d]; equal in pairs if `rotary`."""
    scales = torch.linalg.vector_norm(matrices[0], dim=0)
    return scales[::2].repeat_interleave(2) if rotary else scales


def _multiply_outputs(layer: nn.Linear, matrices: torch.Tensor) -> None:
    """Multiply what a layer returns by matrices, [H, d, d]."""
    weight = layer.weight.double().unflatten(0, matrices.shape[:2])
    layer.weight.copy_((matrices @ weight).flatten(0, 1))
    if layer.bias is not None:
        bias = layer.bias.double().view(*matrices.shape[:2], 1)
        layer.bias.copy_((matrices @ bias).flatten())


def _multiply_inputs(layer: nn.Linear, matrices: torch.Tensor) -> None:
    """Multiply the first H * d columns of a layer's weight by matrices, [H, d, d], from the right."""
    weight = layer.weight[:, : matrices.shape[0] * matrices.shape[1]]
    heads = weight.double().unflatten(1, matrices.shape[:2])
    weight.copy_(torch.einsum("ohd,hde->ohe", heads, matrices).flatten(1))


def _sites(network: nn.Module) -> Iterator[_Site]:
    """Find the self-attention of a network: layers of one batch of tokens, with text among them or not."""
    modules: list[Any] = list(network.modules())
    for module in modules:
        attention = getattr(module, "attn", None)
        if getattr(attention, "pre_only", False) and hasattr(module, "proj_out"):  # Flux's single blocks
            yield _site(attention, [module.proj_out])
    for module in modules:
        is_attention = all(hasattr(module, name) for name in ("to_q", "to_k", "to_v", "to_out", "heads"))
        if is_attention and module.to_out is not None and not getattr(module, "is_cross_attention", False):
            yield _site(module, [module.to_out[0]])


def _site(attention: Any, outputs: list[nn.Linear]) -> _Site:
    def those(*names: str) -> list[Any]:
        return [found for name in names if (found := getattr(attention, name, None)) is not None]

    return _Site(
        heads=attention.heads,
        size=attention.to_k.out_features // attention.heads,
        queries=those("to_q", "add_q_proj"),
        keys=those("to_k", "add_k_proj"),
        values=those("to_v", "add_v_proj"),
        outputs=[*outputs, *those("to_add_out")],
        query_norms=those("norm_q", "norm_added_q"),
        key_norms=those("norm_k", "norm_added_k"),
        rotary=type(attention).__name__.startswith("Flux"),
    )
