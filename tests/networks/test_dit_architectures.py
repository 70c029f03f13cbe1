"""Which transformers are taken on, and which of their calls are refused because xDiT would compute something else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from otil_xdit.catalog.architectures import ARCHITECTURES
from otil_xdit.networks.dit.architectures import check_architecture, read_call


def network_of(kind: str, **config: Any) -> Any:
    """A module whose class has the name of one of diffusers', with a configuration and nothing else."""
    network = type(kind, (nn.Module,), {})()
    network.config = SimpleNamespace(**config)
    return network


def test_what_nobody_has_compared_is_refused_unless_allowed() -> None:
    network = network_of("SomeTransformer2DModel")
    with pytest.raises(ValueError, match=r"SomeTransformer2DModel .* nobody has compared it .*--allow_untested"):
        check_architecture("transformer", network)
    check_architecture("transformer", network, allow_untested=True)


@pytest.mark.parametrize("kind", [kind for kind, facts in ARCHITECTURES.items() if facts.refused])
def test_a_refusal_holds_whatever_is_allowed(kind: str) -> None:
    with pytest.raises(ValueError, match=kind):
        check_architecture("transformer", network_of(kind), allow_untested=True)


def test_masks_that_xdit_does_not_read_are_refused() -> None:
    called = {"hidden_states": torch.zeros(2, 8, 4), "encoder_hidden_states": torch.zeros(2, 8, 4)}
    uneven = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    with pytest.raises(ValueError, match="prompts of different lengths"):
        read_call(network_of("QwenImageTransformer2DModel"), (), {**called, "encoder_hidden_states_mask": uneven}, 1, 2)
    called["encoder_hidden_states_mask"] = torch.ones(2, 8)
    read_call(network_of("QwenImageTransformer2DModel"), (), called, 1, 2)
