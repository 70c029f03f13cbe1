"""Keys and values of the text, projected once: they stay the same as long as text and weights do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

KeysValues = tuple[torch.Tensor, torch.Tensor]


class TextCache:
    """Keeps the keys and values of every cross-attention; projects again when the text or the weights have changed."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[tuple[Any, ...], torch.Tensor, KeysValues]] = {}

    def clear(self) -> None:
        """Forget all keys and values."""
        self._kept.clear()

    def get(
        self, name: str, text: torch.Tensor, layers: tuple[nn.Module, ...], project: Callable[[], KeysValues]
    ) -> KeysValues:
        """Return the keys and values of `text` for the layer `name`.

        Args:
            name: of the layer; unique in the network.
            text: [B, S, D]; kept, so that its memory cannot come to hold another text unnoticed.
            layers: the projections; a change of their parameters or adapters is noticed.
            project: computes keys and values.

        Returns:
            Keys and values, [B, heads, S, d].
        """
        if text.is_inference() or torch.is_grad_enabled():
            return project()  # inference tensors do not count their changes; gradients want their own graph
        key = (tensor_state(text), text.shape, text.stride(), *map(_weights_state, layers))
        kept = self._kept.get(name)
        if kept is None or kept[0] != key:
            kept = self._kept[name] = (key, text, project())
        return kept[2]


def tensor_state(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that changes when the tensor is replaced or written to."""
    version = 0 if tensor.is_inference() else tensor._version
    return (tensor.data_ptr(), version, tensor.dtype)


def _weights_state(layer: nn.Module) -> tuple[Any, ...]:
    """Return a key that changes with the parameters, and (peft) when adapters are set, scaled, merged or disabled."""
    adapters = tuple(
        repr(getattr(layer, name, None)) for name in ("active_adapters", "scaling", "merged", "disable_adapters")
    )
    return (*adapters, *(tensor_state(parameter) for parameter in layer.parameters()))
