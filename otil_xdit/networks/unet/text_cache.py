"""Keys and values of the text, projected once: they stay the same as long as text and weights do.

A ControlNet's embedded condition is kept in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from otil_xdit.networks.quantised import stored_parts

T = TypeVar("T")


class TextCache:
    """Keeps the keys and values of every cross-attention; projects again when the text or the weights have changed."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[tuple[Any, ...], torch.Tensor, Any]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all keys and values."""
        self._kept.clear()

    def get(self, name: str, text: torch.Tensor, layers: tuple[nn.Module, ...], project: Callable[[], T]) -> T:
        """Return what is made of `text` for the layer `name`.

        Args:
            name: of the layer; unique in the network.
            text: [B, S, D]; kept, so that its memory cannot come to hold another text unnoticed.
            layers: the projections; a change of their parameters or adapters is noticed.
            project: makes it: keys and values, [B, heads, S, d].
        """
        if text.is_inference() or torch.is_grad_enabled():
            return project()  # inference tensors do not count their changes; gradients want their own graph
        key = (tensor_state(text), text.shape, text.stride(), *map(_weights_state, layers))
        kept = self._kept.get(name)
        if kept is None or kept[0] != key:
            kept = self._kept[name] = (key, text, project())
        made: T = kept[2]
        return made


def tensor_state(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that changes when the tensor is replaced or written to."""
    return tuple(
        (part.data_ptr(), 0 if part.is_inference() else part._version, part.dtype) for part in stored_parts(tensor)
    )


def _weights_state(layer: nn.Module) -> tuple[Any, ...]:
    """Return a key that changes with the parameters, and (peft) when adapters are set, scaled, merged or disabled."""
    adapters = tuple(
        repr(getattr(layer, name, None)) for name in ("active_adapters", "scaling", "merged", "disable_adapters")
    )
    return (*adapters, *(tensor_state(parameter) for parameter in layer.parameters()))
