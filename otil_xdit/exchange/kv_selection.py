"""Which sub-blocks of a group's layers a rank sends at a step.

Shapes: L layers, l of them in a run; B batch, S tokens of one patch, C features, K sub-blocks, k sent a step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from otil_xdit.exchange.kv_residuals import KVResiduals
from otil_xdit.exchange.kv_transform import KVTransform
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.kernels import MOST_BLOCKS
from otil_xdit.method.scratch import ScratchBuffers
from otil_xdit.method.selection import BlockSelector, blocks_to_send


class KVSelection:
    """Compares a group's layers with what the other ranks know of them, and selects where that lacks most.

    Args:
        transform: of the layers.
        residuals: of the layers.
        table: int64 [K, T], the tokens of each sub-block, on the layers' device.
        config: the settings.
        selector: scores and selects.
        scratch: for intermediate tensors.
    """

    def __init__(
        self,
        transform: KVTransform,
        residuals: KVResiduals,
        table: torch.Tensor,
        config: OtilConfig,
        selector: BlockSelector,
        scratch: ScratchBuffers,
    ) -> None:
        self._transform, self._residuals, self._table = transform, residuals, table
        self._config, self._selector, self._scratch = config, selector, scratch
        self._layers = "", 0
        self._first: dict[int, torch.Tensor] = {}
        self._previous: torch.Tensor | None = None
        self._shared: torch.Tensor | None = None

    def allocate(self, name: str, layers: int) -> None:
        """Make the buffers of L layers, the first of which is called `name`."""
        transform, self._layers = self._transform, (name, layers)
        if self.keeps_previous:
            shape, device = (layers, *transform.shape), self._scratch.device
            self._previous = torch.zeros(shape, dtype=transform.dtype, device=device)
            for layer, fresh in self._first.items():
                self._previous[layer] = fresh
        self._first.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device."""
        previous = 0 if self._previous is None else self._previous.nbytes
        return previous + sum(kept.nbytes for kept in self._first.values())

    @property
    def keeps_previous(self) -> bool:
        """Tell whether a layer's next sub-blocks are compared with what it was called with last."""
        return self._config.selects_by_layer and self._config.score_reference == "previous"

    @property
    def compares_with_prediction(self) -> bool:
        """Tell whether fresh values are compared with what the other ranks predict."""
        return self._config.ratio < 1 and self._previous is None

    @property
    def is_one_pass(self) -> bool:
        """Tell whether a kernel finds the sub-blocks to send, or they are the same for all layers, or all are sent."""
        return not self._config.selects_by_layer or (self._selector.compares_by_l2 and not self.keeps_previous)

    def set_previous(self, layers: int | slice, fresh: torch.Tensor) -> None:
        """Take note of what was sent of a layer or a run of layers, coded [2, B, S, C] or [l, 2, B, S, C]."""
        if self._previous is not None:
            self._previous[layers] = fresh
        elif self.keeps_previous and isinstance(layers, int):
            self._first[layers] = fresh.clone()

    def select_shared(self) -> None:
        """Select the sub-blocks that all layers send at this step; see `BlockSelector.select_shared` when to call."""
        if self._config.ratio < 1:
            self._shared = self._selector.select_shared(self._table, self._transform.shape[2])

    def compare(self, run: slice, residual: torch.Tensor | None) -> torch.Tensor:
        """Return how much each sub-block of a run of layers has changed, float32 [l, K].

        Args:
            run: layers.
            residual: what the others' prediction lacks, [l, 2, B, S, C]; None where nothing is compared with that.
        """
        fresh = self._transform.coded_own(run)
        if self._previous is not None:
            return self._selector.scores(self._table, fresh, self._previous[run], None)
        assert residual is not None, "see `compares_with_prediction`"
        if self._selector.compares_by_l2:
            return self._selector.scores(self._table, fresh, fresh, residual)
        return self._selector.scores(self._table, fresh, fresh - residual, None)

    def select(self, run: slice, scores: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the sub-blocks that each layer of a run sends, int64 [l, k], contiguous.

        Args:
            run: layers.
            scores: computes them, where nothing else says what is selected.
        """
        if self._shared is not None:
            return self._shared_of(run, self._shared)
        return self._selector.select_scored(self._layers, self._table, scores(), run)

    @staticmethod
    def _shared_of(run: slice, selected: torch.Tensor) -> torch.Tensor:
        """Return what all layers send, int64 [1, k], for each of a run."""
        return selected.expand(run.stop - run.start, -1).contiguous()

    def select_by_kernel(self, run: slice, all_sent: bool, is_awaited: bool) -> torch.Tensor | None:
        """Find the next gains, and return what `select` does; None where everything is sent.

        Args:
            run: layers.
            all_sent: whether it is.
            is_awaited: whether everybody waits for it at this step.
        """
        table, shared = self._table, self._shared
        if all_sent or shared is not None:
            self._residuals.settle(run, table, None, is_awaited)
            return None if all_sent or shared is None else self._shared_of(run, shared)
        # The kernel that compares a layer's sub-blocks says which are sent, too, if it can.
        picks = self._selector.takes_largest and len(table) <= MOST_BLOCKS
        count = blocks_to_send(len(table), self._config.ratio) if picks else 0
        scores, selected = self._residuals.settle(run, table, count, is_awaited)
        return selected if picks else self._selector.select_scored(self._layers, table, scores, run)
