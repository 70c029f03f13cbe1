"""Attention backends: SDPA unless another is named, and a named one checked against the pipeline's networks."""

from __future__ import annotations

import copy
from functools import wraps
from typing import Any

from otil_xdit.catalog.attention_backends import check_backend, head_sizes_of_config
from otil_xdit.runtime.network_hooks import networks_of
from otil_xdit.xdit.plugin.args import choice_of

_SPARSE = {"SPARGE", "SPARSE", "VSA", "BLOCK"}
"""Words in the names of xDiT's backends that skip blocks of keys."""


def hook_backends(state_class: Any) -> None:
    """Let attention be SDPA's where nobody names a backend, and lift the limits of ring attention on those named."""
    from xfuser.core.distributed.attention_backend import AttentionBackendType

    select = state_class._select_attention_backend

    @wraps(select)
    def select_backend(self: Any, engine_config: Any = None) -> Any:
        named = engine_config is not None and engine_config.runtime_config.attention_backend
        # xDiT would pick cuDNN's wherever torch has it and call it past torch's checks, for float32 and any head too.
        if named or choice_of(getattr(self, "parallel_config", None)) is None:
            return select(self, engine_config)
        return AttentionBackendType.SDPA

    state_class._select_attention_backend = select_backend
    check = state_class._check_if_backend_compatible_with_current_configuration

    @wraps(check)
    def check_backend(self: Any, attention_backend: Any) -> None:
        if choice_of(getattr(self, "parallel_config", None)) is None:
            return check(self, attention_backend)
        check_dense(attention_backend)
        # Nothing is merged by log-sum-exp under a strategy, so the limits of ring_degree > 1 do not hold.
        without_ring = copy.copy(self)
        without_ring.parallel_config = copy.copy(self.parallel_config)
        without_ring.parallel_config.ring_degree = 1
        return check(without_ring, attention_backend)

    state_class._check_if_backend_compatible_with_current_configuration = check_backend


def use_sdpa_unless_named(state: Any, engine_config: Any) -> None:
    """Do what `hook_backends` does for a U-Net that shares an image without a strategy."""
    if not engine_config.runtime_config.attention_backend:
        state.set_attention_backend("SDPA")


def check_backends(runtime_config: Any, pipeline: Any) -> None:
    """Check that the attention backends that are named can serve the pipeline's networks.

    Raises:
        ValueError: naming backend and network.
    """
    for name, network in networks_of(pipeline).items():
        config: Any = getattr(network, "config", {})
        heads = head_sizes_of_config(config)
        dtype = str(getattr(network, "dtype", "")).removeprefix("torch.") or None
        for backend in (runtime_config.attention_backend, runtime_config.cross_attention_backend):
            check_backend(backend, f"the pipeline's {name}", dtype, heads)


def check_dense(attention_backend: Any) -> None:
    """Check that an attention backend looks at every key.

    Raises:
        ValueError: naming it.
    """
    name = attention_backend.name
    if _SPARSE.intersection(name.split("_")):
        raise ValueError(
            f"--attention_backend {name} is not supported with --parallel: it lays blocks over the whole image, and a "
            "rank has a part of it; choose a dense one"
        )
