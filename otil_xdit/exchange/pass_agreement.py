"""What the ranks of the two passes of guidance agree on, where each computes one of them.

Guidance multiplies the difference of the passes' predictions, and with it all errors that they have not in common. In
one batch both passes have one gain and one selection of sub-blocks, so their errors are alike. Ranks that have one pass
each tell each other what gains they fit: at once of a layer that has none yet, else those of all layers in one message
a step. To agree on sub-blocks would take another message for each layer. They send all of them while they wait, where
these are not many more than they would select.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from otil_xdit.comm.collectives import CollectiveLabel, Collectives
from otil_xdit.method.config import OtilConfig

ALL_FROM = 0.75
"""The ratio from which ranks of either pass send all sub-blocks while they wait: at most a third more bytes then."""


class PassAgreement:
    """Averages what is measured over the ranks that hold the same rows, one of each pass.

    Args:
        collectives: over these ranks.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives

    @staticmethod
    def serves(config: OtilConfig) -> bool:
        """Tell whether there is something to agree on, and all of the ranks come to it at the same calls.

        With a tolerance each layer waits by its own error; two stages call different layers.
        """
        waits = config.freshness == "fresh" or (config.freshness == "displaced" and config.fresh_share > 0)
        together = not config.tolerance and not config.requires_cfg_parallel
        return waits and together and (config.extrapolation == "fitted" or config.selects_by_layer)

    def mean(self, measured: Sequence[torch.Tensor], label: CollectiveLabel) -> list[torch.Tensor]:
        """Return the means of what each of the ranks has measured; waits for the others'.

        Args:
            measured: float32, of the same shapes on all of the ranks.
            label: the counter, and the place in error messages.
        """
        own = torch.cat([part.flatten() for part in measured])
        everybody = own.new_empty(self._collectives.group.world_size, own.numel())
        mean = self._collectives.all_gather(own, everybody, label).wait().mean(dim=0)
        parts = mean.split([part.numel() for part in measured])
        return [part.view(given.shape) for part, given in zip(parts, measured, strict=True)]
