"""The table of codecs, by the names that settings take."""

from __future__ import annotations

from collections.abc import Callable

import torch

from otil_xdit.method.adaptive_codec import AdaptiveCodec
from otil_xdit.method.codec import Codec, Quantised, Raw

CODECS: dict[str, Callable[[torch.dtype], Codec]] = {
    "raw": Raw,
    "int8": lambda dtype: Quantised(8),
    "int4": lambda dtype: Quantised(4),
    "2bit": lambda dtype: Quantised(2),
    "1bit": lambda dtype: Quantised(1),
    "adaptive": lambda dtype: AdaptiveCodec(),
}
"""Makers of codecs, called with the dtype of the values, by the names that `OtilConfig.codec` takes."""


def make_codec(name: str, dtype: torch.dtype) -> Codec:
    """Return the codec of that name, one of `CODECS`, for values of `dtype`."""
    return CODECS[name](dtype)
