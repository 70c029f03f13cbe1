"""What is wrong in xfuser still is; a shim whose mistake has gone is to be removed from `xdit/plugin/shims.py`."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from otil_xdit.xdit.plugin import backends, shims
from otil_xdit.xdit.plugin.register import register


@pytest.mark.parametrize("shim", shims.SHIMS, ids=lambda shim: shim.owner)
def test_xfuser_still_has_the_mistake(shim: shims.Shim) -> None:
    register()
    assert shim.is_needed(), f"{shim.owner}.{shim.method} is mended: remove its shim"


def test_a_mended_mistake_is_left_alone() -> None:
    register()
    mended = shims.Shim(shims.SHIMS[0].module, shims.SHIMS[0].owner, "__call__", "no such line", lambda owner: None)
    unknown = shims.Shim("xfuser.no_such_module", "Nothing", "__call__", "", lambda owner: None)
    assert not mended.is_needed() and not unknown.is_needed()


def test_backends_that_skip_keys_are_refused() -> None:
    from xfuser.core.distributed.attention_backend import AttentionBackendType

    for backend in AttentionBackendType:
        if backend.name in ("SDPA", "FLASH", "SAGE", "AITER"):
            backends.check_dense(backend)
    for name in ("AITER_SPARGE", "FLEX_BLOCK_ATTN", "AITER_VSA", "AITER_SPARSE_SAGE"):
        with pytest.raises(ValueError, match=f"{name} is not supported with --parallel"):
            backends.check_dense(AttentionBackendType[name])


class Block(nn.Module):
    """A block of FLUX.2 that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, hidden: torch.Tensor, encoder: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        return encoder, hidden * 2


@pytest.mark.parametrize(("is_mended", "calls"), [(True, [6, 4]), (False, [3, 3])])
def test_flux2s_cache_compares_two_steps(is_mended: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps that all differ, and six of which every second is like the one before (a step after one that was left
    out is not kept for the comparison, as in all of xDiT's caches)."""
    register()
    from xfuser.model_executor.cache.adapters import flux2

    kind: Any = flux2.Flux2FBCachedTransformerBlocks
    monkeypatch.setattr(kind, "is_parallelized", False)
    if not is_mended:
        monkeypatch.setattr(kind, "get_modulated_inputs", inspect.unwrap(kind.get_modulated_inputs))
    for steps, expected in zip((range(1, 7), (1, 1, 2, 2, 3, 3)), calls, strict=True):
        cached = kind([Block(), Block()], rel_l1_thresh=0.01, return_hidden_states_first=False)
        for step in steps:
            cached(torch.full((1, 4, 2), float(step)), torch.zeros(1, 2, 2))
        assert cached.transformer_blocks[1].calls == expected
