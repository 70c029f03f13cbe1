"""Keys and values of the text: the same in all steps of a generation, as long as text and weights are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

KeysValues = tuple[torch.Tensor, torch.Tensor]


class TextCache:
    """Keys and values of every cross-attention, computed again when the text or the weights have changed."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[tuple[Any, ...], torch.Tensor, KeysValues]] = {}

    def clear(self) -> None:
        self._kept.clear()

    def get(
        self, name: str, text: torch.Tensor, layers: tuple[nn.Module, ...], project: Callable[[], KeysValues]
    ) -> KeysValues:
        """The keys and values of `text` for the layer `name`.

        Args:
            name: tells the attention from every other.
            text: [B, S, D]; kept, so that its memory cannot come to hold another text unnoticed.
            layers: what projects it; their parameters and adapters are watched.
            project: computes keys and values.
        """
        if text.is_inference() or torch.is_grad_enabled():
            return project()  # inference tensors do not count their changes; gradients want their own graph
        key = (_state(text), text.shape, text.stride(), *map(_weights_state, layers))
        kept = self._kept.get(name)
        if kept is None or kept[0] != key:
            kept = self._kept[name] = (key, text, project())
        return kept[2]


def _state(tensor: torch.Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return (tensor.data_ptr(), version, tensor.dtype)


def _weights_state(layer: nn.Module) -> tuple[Any, ...]:
    """Changes when the parameters do, or (with peft) when adapters are chosen, scaled, merged or turned off."""
    adapters = tuple(
        repr(getattr(layer, name, None)) for name in ("active_adapters", "scaling", "merged", "disable_adapters")
    )
    return (*adapters, *(_state(parameter) for parameter in layer.parameters()))
