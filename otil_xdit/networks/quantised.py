"""Quantised weights: what is stored of them, and which layers compute each token by itself, as patches need it.

A layer whose weights alone are quantised (torchao's weight-only kinds, GGUF, bitsandbytes' four bits) gives a token the
same numbers whatever other tokens there are. One that also quantises what it is given turns the last bits of sums,
which depend on how the image is cut, into whole levels; and its scales or outliers may be taken over all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

WEIGHT_ONLY = ("bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.LinearNF4")
"""Layers of other packages whose weights alone are quantised."""

_OF_INPUT = ("act_quant_kwargs", "act_quant_scale")
"""Attributes of torchao's weights that say how what the layer is given is quantised; None where it is not."""


def stored_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors of which a quantised one is made; a plain tensor is its own and only part."""
    made: Any = tensor
    if not is_traceable_wrapper_subclass(made):
        return [tensor]
    names, _ = made.__tensor_flatten__()
    return [part for name in names for part in stored_parts(getattr(tensor, name))]


def quantises_input(weight: object) -> bool:
    """Tell whether a weight's layer also quantises what it is given."""
    if not is_traceable_wrapper_subclass(weight):
        return False
    is_older = type(weight).__name__.startswith("LinearActivation")
    return is_older or any(getattr(weight, name, None) is not None for name in _OF_INPUT)
