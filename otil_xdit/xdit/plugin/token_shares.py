"""Unequal shares of a DiT's tokens: xDiT's transformers cut them by `torch.chunk`, and join them by one all-gather.

While a session has unequal shares, both cut where `otil_xdit.networks.dit.token_cut` says. Nothing else of a
transformer depends on the number of its rank's tokens, but its attention, which gathers keys by the same cut.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

from otil_xdit.networks.dit.architectures import architecture_of, is_cut_by_pipeline
from otil_xdit.runtime.session import PatchSession
from otil_xdit.xdit.plugin.transformers import MODELS, RUNNER_TRANSFORMERS

_HELPERS = "transformers_utils"
"""xDiT's module of functions that several of its transformers cut tokens by."""


def check_unequal_shares(name: str, network: torch.nn.Module) -> None:
    """Check that the ranks may have unequal shares of a network's tokens.

    Args:
        name: the pipeline's attribute that holds it.
        network: a diffusers model or xDiT's wrapper of one.

    Raises:
        ValueError: naming the network's class and the reason.
    """
    reason = architecture_of(network).why_equal_shares
    if not reason and is_cut_by_pipeline(network):
        reason = "xDiT's wrapper of the pipeline cuts its tokens evenly"
    if reason:
        kind = getattr(network, "module_type", type(network)).__name__
        raise ValueError(f"--patch_shares is not possible for {kind} (the pipeline's {name}): {reason}; leave it out")


def hook_token_cuts(networks: Iterable[torch.nn.Module]) -> None:
    """Have the modules of xDiT's classes of networks cut tokens by `cut_tokens`."""
    kinds = {kind.__name__ for network in networks for kind in type(network).__mro__}
    names = [_HELPERS, *(facts.module for name, facts in RUNNER_TRANSFORMERS.items() if name in kinds)]
    for name in names:
        with suppress(ImportError):
            module: Any = importlib.import_module(f"{MODELS}.{name}")
            module.torch = _TORCH


def cut_tokens(tokens: torch.Tensor, chunks: int, dim: int = 0) -> tuple[torch.Tensor, ...]:
    """Cut a tensor as `torch.chunk` does, or tokens by their ranks' shares where these are unequal."""
    session = PatchSession.active()
    # xDiT shares out the passes of guidance by the same function, [B] or [B, S, C], along their first dimension.
    is_batch = dim == 0 and tokens.dim() != 2
    if session is None or is_batch or chunks != session.dit.keys.cut.ranks or not session.dit.keys.cut.shares:
        return torch.chunk(tokens, chunks, dim)
    return session.dit.keys.cut_tokens(tokens, dim)


def join_tokens(all_gather: Callable[..., Any], group: Any, tokens: torch.Tensor, dim: int) -> torch.Tensor:
    """Return all ranks' tokens where their shares are unequal.

    Args:
        all_gather: of xDiT's `GroupCoordinator`.
        group: of the ranks that share the tokens.
        tokens: this rank's, along `dim`.

    Raises:
        ValueError: where these are not what the network is known to put together.
    """
    session = PatchSession.active()
    assert session is not None, "tokens are joined in a generation"
    sizes, own = session.dit.keys.joined_sizes(), tokens.shape[dim]
    if own != sizes[group.rank_in_group]:
        raise ValueError(
            f"this rank puts {own} tokens together with the others', and its share is {sizes[group.rank_in_group]}; "
            "otil-xdit does not know this version of xDiT, or of the model: leave --patch_shares out"
        )
    first = tokens.movedim(dim, 0)
    filled = functional.pad(first.flatten(1), (0, 0, 0, max(sizes) - own))
    parts = all_gather(group, filled.contiguous(), 0).unflatten(0, (len(sizes), -1))
    joined = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return joined.unflatten(1, first.shape[1:]).movedim(0, dim)


def _like_torch() -> ModuleType:
    """Return torch under another identity, whose `chunk` is `cut_tokens`."""
    module = ModuleType("torch")
    vars(module).update(vars(torch), chunk=cut_tokens)
    return module


_TORCH = _like_torch()
