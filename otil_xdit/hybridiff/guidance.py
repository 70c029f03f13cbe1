"""`Guidance`: both predictions of classifier-free guidance, how far they differ, and one in place of both.

A network predicts with and without the prompt (e_c and e_u): for both in one batch, [e_u, e_c], as most pipelines of
diffusers do; in two calls, first e_c; or on different ranks (CFG parallelism), which show each other theirs.

Hybridiff's *denoising discrepancy* (CVPR 2026) is mean|e_c - e_u| / mean|e_u| of a step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from otil_xdit.method.config import HeldGuidance

Share = Callable[[torch.Tensor], torch.Tensor]
"""Returns a tensor, [...], of every rank: [N, ...]."""


class Guidance:
    """The two predictions of one pipeline's generations.

    Args:
        held: see `HeldGuidance`.
    """

    def __init__(self, held: HeldGuidance = "held") -> None:
        self._held = held
        self.is_staged = False
        """Whether the network call under way gives e_c alone; what stands for e_u means nothing."""
        self.is_wanted = False
        """Whether differences are to be kept for such calls."""
        self.is_guided = False
        """Whether the step that ended last has been predicted with and without the prompt."""
        self.has_parts = False
        """Whether a rank sees its own rows of the predictions only."""
        self._outputs: list[torch.Tensor] = []
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._calls = 0
        self._differences: dict[int, torch.Tensor] = {}
        self._sums: list[torch.Tensor | None] = []

    def begin(self) -> None:
        """Forget an earlier generation."""
        self.is_staged = False
        self._sums.clear()
        self._differences.clear()
        self._forget_step()

    def record(self, output: torch.Tensor) -> None:
        """Record a network's prediction, [B, ...] or [2 B, ...]; which of the two it is `end_step` knows."""
        self._outputs.append(output)

    def record_pair(self, uncond: torch.Tensor, cond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Record both predictions of a network call, of one shape, and return those to use in their place."""
        call, self._calls = self._calls, self._calls + 1
        if not self.is_staged:
            self._pairs.append((uncond, cond))
            if self.is_wanted:
                self._differences[call] = cond - uncond
            return uncond, cond
        if self._held == "none":
            return cond, cond
        return cond - self._differences[call], cond

    def end_step(self, sample: torch.Tensor | None) -> None:
        """Pair the predictions of a step, which have all been recorded, and add them up.

        Args:
            sample: the latent that the scheduler is about to step, [B, C, ...].
        """
        if sample is not None:
            if self._calls == 0:
                self._pair_outputs(sample.shape[0])
            # The two parts of a batch of three passes, or of two images and one pass, are not what they seem.
            self._pairs = [pair for pair in self._pairs if pair[0].shape[0] == sample.shape[0]]
        self.is_guided = bool(self._pairs or (self._calls and self.is_staged))
        sums = [_sums(_like(uncond, sample), _like(cond, sample)) for uncond, cond in self._pairs]
        self._sums.append(torch.stack(sums).sum(0) if sums else None)
        self._forget_step()

    def discrepancy(self, share: Share) -> float:
        """Return the discrepancy of the step that ended last, in which both predictions were computed.

        Args:
            share: every rank takes part, and every rank gets the same number.
        """
        last = self._sums[-1]
        assert last is not None, "both predictions were computed"
        return _ratio(share(last))

    def curve(self, share: Share | None) -> list[float | None]:
        """Return the discrepancy of every step; None for one that was not guided by two computed predictions.

        Args:
            share: as in `discrepancy`; None where this rank's numbers are those of the whole.
        """
        known = [sums for sums in self._sums if sums is not None]
        if not known:
            return [None for _ in self._sums]
        stacked = torch.stack(known)
        ratios = iter([_ratio(one) for one in (share(stacked) if share is not None else stacked[None]).unbind(1)])
        return [None if sums is None else next(ratios) for sums in self._sums]

    def _forget_step(self) -> None:
        self._outputs.clear()
        self._pairs.clear()
        self._calls = 0

    def _pair_outputs(self, batch: int) -> None:
        sizes = [output.shape[0] for output in self._outputs]
        if sizes == [2 * batch]:
            uncond, cond = self._outputs[0].chunk(2)
            self._pairs.append((uncond, cond))
        elif sizes == [batch, batch] and self._outputs[0].shape == self._outputs[1].shape:
            self._pairs.append((self._outputs[1], self._outputs[0]))


def _like(prediction: torch.Tensor, sample: torch.Tensor | None) -> torch.Tensor:
    """Return a prediction without the channels of a predicted variance, which guidance does not read."""
    if sample is None or not sample.ndim == prediction.ndim > 2 or prediction.shape[1] != 2 * sample.shape[1]:
        return prediction
    return prediction[:, : sample.shape[1]]


def _sums(uncond: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    """Return the sums of |e_c - e_u| and |e_u|, float64 [2]."""
    differences = (cond - uncond).abs().sum(dtype=torch.float64)
    return torch.stack((differences, uncond.abs().sum(dtype=torch.float64)))


def _ratio(sums: torch.Tensor) -> float:
    """Return the discrepancy of all ranks' sums, [N, 2], added up on the host in the same order everywhere."""
    parts: list[list[float]] = sums.tolist()
    difference, size = (sum(part[place] for part in parts) for place in (0, 1))
    return difference / size if size else 0.0
