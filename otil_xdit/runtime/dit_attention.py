"""`DitAttention`: the keys of a DiT's attention call, from what is sent of them to what is attended to."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from otil_xdit.exchange.protocol import Communicator
from otil_xdit.networks.dit.key_plan import Kept
from otil_xdit.networks.dit.keys import DitKeys
from otil_xdit.runtime.network_hooks import NetworkHooks


class DitAttention:
    """The attention call under way.

    Args:
        communicator: of the patches.
        hooks: of the networks; they know which layer calls, and what its tokens are.
    """

    def __init__(self, communicator: Communicator, hooks: NetworkHooks) -> None:
        self._communicator, self._hooks = communicator, hooks
        self._kept: Kept | None = None

    @property
    def keys(self) -> DitKeys:
        """Return what is known of the tokens of the transformer call under way."""
        return self._hooks.keys

    @property
    def has_whole_masks(self) -> bool:
        """Return whether the masks of the network that computes cover the keys of all ranks."""
        return self._hooks.has_whole_masks

    def gather(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return every patch's keys and values, [B, H, S, D]; `take_kept` returns next which of them are real.

        Those that every rank has by itself are not sent, and stand in front of the others.
        """
        plan, own = self._hooks.plan_keys(key), (key, value)
        if plan.sent is not None:
            key, value = key.index_select(2, plan.sent), value.index_select(2, plan.sent)
        if plan.longest > key.shape[2]:
            key, value = (pad(one, (0, 0, 0, plan.longest - one.shape[2])) for one in (key, value))
        key, value = self._communicator.gather(self._hooks.current_layer(), key, value)
        if plan.unfilled is not None:
            key, value = key.index_select(2, plan.unfilled), value.index_select(2, plan.unfilled)
        if plan.own is not None:
            pairs = zip(own, (key, value), strict=True)
            key, value = (torch.cat([one.index_select(2, plan.own), others], 2) for one, others in pairs)
        self._kept = plan.kept
        return key, value

    def keep_real(self, key: torch.Tensor) -> None:
        """Have `take_kept` return which keys are real, where they are not gathered over patches."""
        self._kept = self._hooks.plan_keys(key).kept

    def keep_all(self) -> None:
        """Have `take_kept` return None: a mask says which keys are real."""
        self._kept = None

    def take_kept(self) -> Kept | None:
        """Return the positions of the real keys, once; None for all."""
        kept, self._kept = self._kept, None
        return kept

    def kept_of_gathered(self, keys: int) -> int | None:
        """Return how many of the keys that xDiT itself has gathered are real; None for all."""
        return self._hooks.kept_of_gathered(keys)
