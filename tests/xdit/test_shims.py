"""What is wrong in xfuser still is; a shim whose mistake has gone is to be removed from `xdit/plugin/shims.py`."""

from __future__ import annotations

import pytest

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
