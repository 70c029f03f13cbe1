"""Which attention backends of xDiT take which numbers and heads, so that a named one is refused before weights load.

xDiT calls several operators past the checks of torch's `scaled_dot_product_attention`: cuDNN's takes float32 for half
precision and returns noise, others fail in the first step. SDPA checks by itself and takes everything.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from otil_xdit.catalog.record import ModelRecord
from otil_xdit.catalog.unets import heads_of

HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class AttentionBackend:
    """What a backend takes.

    Attributes:
        dtypes: of queries, keys and values, as torch names them.
        largest_head: numbers of a head.
        multiple: of which a head must have.
        fewest_tokens: of a sequence.
    """

    dtypes: tuple[str, ...] = HALF
    largest_head: int = 256
    multiple: int = 1
    fewest_tokens: int = 1


BACKENDS: dict[str, AttentionBackend] = {
    "CUDNN": AttentionBackend(largest_head=128, multiple=8, fewest_tokens=2),
    "SDPA_FLASH": AttentionBackend(multiple=8),
    "SDPA_EFFICIENT": AttentionBackend((*HALF, "float32"), largest_head=2**16, multiple=8),
    "FLASH": AttentionBackend(),
    "FLASH_3": AttentionBackend(multiple=8),
    "FLASH_3_FP8": AttentionBackend(multiple=16),
    "FLASH_4": AttentionBackend(largest_head=128, multiple=8),
    "SAGE": AttentionBackend(largest_head=128),
}
"""By xDiT's names, from torch's and the packages' own checks (aten/native/transformers/cuda/sdp_utils.cpp,
flash-attn, sageattention). A backend that does not stand here is not checked."""


def check_backend(name: str | None, what: str, dtype: str | None, heads: set[int], tokens: int | None = None) -> None:
    """Refuse an attention backend for a network that it cannot serve.

    Args:
        name: of the backend, in any case; None where none is named.
        what: the network, for the message.
        dtype: that it computes in; None where it is not known.
        heads: the sizes of its heads.
        tokens: the fewest of any of its sequences; None where that is not known.

    Raises:
        ValueError: naming what the backend takes.
    """
    backend = BACKENDS.get((name or "").upper())
    if backend is None:
        return
    wrong = [size for size in sorted(heads) if size > backend.largest_head or size % backend.multiple]
    reasons = [f"{what} has heads of {', '.join(map(str, wrong))}"] if wrong else []
    if dtype is not None and dtype not in backend.dtypes:
        reasons.append(f"{what} computes in {dtype}")
    if tokens is not None and tokens < backend.fewest_tokens:
        reasons.append(f"{what} has a sequence of {tokens}")
    if reasons:
        takes = f"{' or '.join(backend.dtypes)} and heads of at most {backend.largest_head} numbers"
        takes += f", a multiple of {backend.multiple}" if backend.multiple > 1 else ""
        takes += f", and sequences from {backend.fewest_tokens} up" if backend.fewest_tokens > 1 else ""
        raise ValueError(f"--attention_backend {name} takes {takes}; {'; '.join(reasons)}; give SDPA, which takes all")


def head_sizes(record: ModelRecord | None) -> set[int]:
    """Return the sizes of a model's self-attention heads; empty where its network is not known."""
    network = None if record is None else record.network
    if network is None:
        return set()
    kind = getattr(importlib.import_module("diffusers"), network.kind)
    defaults = {name: one.default for name, one in inspect.signature(kind.__init__).parameters.items()}
    return head_sizes_of_config({**defaults, **network.settings})


def head_sizes_of_config(config: Mapping[str, Any]) -> set[int]:
    """Return the sizes of self-attention heads from a network's whole configuration; empty where it does not say."""
    if "block_out_channels" not in config:
        size = config.get("attention_head_dim")
        return {size} if isinstance(size, int) else set()
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    blocks = config["down_block_types"]
    by_level = [heads] * len(blocks) if isinstance(heads, int) else list(heads)
    levels = zip(config["block_out_channels"], by_level, strict=True)
    attends = set(heads_of(config))
    return {channels // count for channels, count in levels if count in attends}
