"""`keeps_tensors`: buffers that outlive `torch.inference_mode`, under which an image may be made and the next not."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def keeps_tensors(call: Callable[P, T]) -> Callable[P, T]:
    """Wrap a function that makes tensors which later calls write to.

    Tensors that are made under `torch.inference_mode` cannot be written to outside it, so the function is left for
    `torch.no_grad`, which is the same to what it computes.
    """

    @wraps(call)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return call(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return call(*args, **kwargs)

    return outside
