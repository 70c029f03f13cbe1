"""Which transformers are taken on, and which of their calls are refused because xDiT would compute something else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from otil_xdit.catalog.architectures import ARCHITECTURES
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.networks.dit.architectures import check_architecture
from otil_xdit.networks.dit.keys import DitKeys
from otil_xdit.networks.dit.token_counts import Rows, Tokens, missing_frames


def network_of(kind: str, **config: Any) -> Any:
    """A module whose class has the name of one of diffusers', with a configuration and nothing else."""
    network = type(kind, (nn.Module,), {"forward": lambda self, hidden_states: hidden_states})()
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


def keys_of(ranks: int) -> DitKeys:
    return DitKeys(PatchGroup(None, 0, ranks), (0, 1))


def test_masks_that_xdit_does_not_read_are_refused() -> None:
    network = network_of("HunyuanVideoTransformer3DModel", patch_size=2, patch_size_t=1)
    called = {"hidden_states": torch.zeros(2, 4, 1, 8, 8), "encoder_attention_mask": torch.ones(2, 8)}
    keys_of(2).read(network, (), called, False)
    called["encoder_attention_mask"][1, 6:] = 0
    with pytest.raises(ValueError, match="encoder_attention_mask marks padding in a batch of prompts of different"):
        keys_of(2).read(network, (), called, False)


@pytest.mark.parametrize(
    ("frames", "tokens", "ranks", "more"), [(1, 16, 3, 2), (3, 9, 2, 1), (4, 9, 2, 0), (5, 6, 4, 1)]
)
def test_frames_are_added_until_the_ranks_divide_the_tokens(frames: int, tokens: int, ranks: int, more: int) -> None:
    assert missing_frames(frames, tokens, ranks) == more
    filled = Tokens(frames * tokens, frame=tokens).with_frames(ranks)
    assert filled.count == (frames + more) * tokens and filled.count % ranks == 0
    assert filled.real is None if more == 0 else filled.real[0].tolist() == list(range(frames * tokens))


def test_rows_that_a_script_shares_out_unevenly_are_refused() -> None:
    network = network_of("CogVideoXTransformer3DModel", patch_size=2, patch_size_t=None)
    called = {"hidden_states": torch.zeros(1, 2, 4, 8, 8)}
    keys_of(3).read(network, (), called, False)
    with pytest.raises(
        ValueError, match="8 rows of latent pixels cannot be shared evenly by 3 ranks, which this script"
    ):
        keys_of(3).read(network, (), called, False, Rows(8, 12))


def test_a_setting_that_xdit_does_not_read_is_refused() -> None:
    check_architecture("transformer", network_of("Cosmos3OmniTransformer", use_und_k_norm_for_gen=False))
    with pytest.raises(ValueError, match="Cosmos3OmniTransformer .* leaves out the norm of the text's keys"):
        check_architecture("transformer", network_of("Cosmos3OmniTransformer", use_und_k_norm_for_gen=True))
