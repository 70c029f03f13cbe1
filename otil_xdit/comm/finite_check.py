"""NaN and Inf among what a rank is about to send: codes of few bits cannot carry them, so only the sender can tell."""

from __future__ import annotations

from collections import defaultdict

import torch

from otil_xdit.errors import NotFinite


class FiniteCheck:
    """Sums of a rank's own numbers by layer, looked at once a step.

    A sum is NaN or Inf if one of its numbers is (or two thirds of the largest float32 are exceeded by finite ones). The
    sums stay on their device. On the CPU they are looked at after each step; elsewhere after the next one, when the
    device has long computed them, so that the host does not wait for it.
    """

    def __init__(self) -> None:
        self._recorded: list[tuple[str, torch.Tensor]] = []
        self._late: _Copied | None = None

    def begin(self) -> None:
        """Forget an earlier generation."""
        self._recorded.clear()
        self._late = None

    def record(self, name: str, *values: torch.Tensor) -> None:
        """Take note of numbers, floating point of any shape, that the layer `name` sends to others.

        Few numbers in float32 are kept as they are and must not be written to before `check`; of others the sum is.
        """
        for one in values:
            if one.is_meta:  # the planner's networks have shapes only
                return
            is_small = one.dtype == torch.float32 and one.numel() <= _FEW
            self._recorded.append((name, one if is_small else one.sum(dtype=torch.float32)))

    def check(self, step: int, rank: int, is_last: bool) -> None:
        """Look at the numbers of `step`, which is done.

        Args:
            rank: for the message.
            is_last: whether no step follows, so that nothing may be left for later.

        Raises:
            NotFinite: naming the rank, the first layer and the step.
        """
        late, self._late = self._late, None
        if self._recorded:
            names = [name for name, _ in self._recorded]
            self._late = _Copied(step, names, *_summed([one for _, one in self._recorded]))
            self._recorded.clear()
        if late is not None:
            late.check(rank)
        if self._late is not None and (is_last or self._late.is_here):
            late, self._late = self._late, None
            late.check(rank)


_FEW = 4096
"""Numbers that are kept until a step's end; those of equal shape are then summed at once."""


def _summed(recorded: list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """Return the sum of each tensor, float32 [n], and the place in the list of the tensor that each is of."""
    by_shape = defaultdict[torch.Size, list[int]](list)
    for place, one in enumerate(recorded):
        by_shape[one.shape].append(place)
    sums = []
    for shape, places in by_shape.items():
        together = torch.stack([recorded[place] for place in places])
        sums.append(together.flatten(1).sum(1) if shape else together)
    return torch.cat(sums), [place for places in by_shape.values() for place in places]


class _Copied:
    """One step's sums on their way to the host.

    Args:
        step: of the generation.
        names: of the layers, in the order of their calls.
        sums: float32 [n].
        places: of which of the names each is.
    """

    def __init__(self, step: int, names: list[str], sums: torch.Tensor, places: list[int]) -> None:
        self._step, self._names, self._places = step, names, places
        self.is_here = sums.device.type == "cpu"
        self._arrival: torch.cuda.Event | None = None
        if sums.device.type == "cuda":
            self._sums = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            self._sums.copy_(sums, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()
        else:
            self._sums = sums

    def check(self, rank: int) -> None:
        if self._arrival is not None:
            self._arrival.synchronize()
        good = torch.isfinite(self._sums)
        if good.all():
            return
        first = min(self._places[number] for number in good.logical_not().nonzero().flatten().tolist())
        where = f"layer {self._names[first]} at step {self._step}"
        raise NotFinite(f"rank {rank}: NaN or Inf among this rank's numbers in {where}", (self._step, first))
