"""Which of a network's blocks asks for what: a look at one call of it, block by block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import nn

from otil_xdit.hybridiff.forward_hooks import ForwardHooks, Inputs
from otil_xdit.hybridiff.tracing import Tracer
from otil_xdit.networks.dit.layer_names import blocks_of as dit_blocks
from otil_xdit.networks.unet.levels import blocks_of as unet_blocks
from otil_xdit.networks.unet.model import is_unet

T = TypeVar("T")


class UnitWatch:
    """Watches one call of a network, whose units are the blocks that a run in two stages has, in its order.

    Attributes:
        units: the blocks.
        tracer: what was seen of the call, where there was one.
        spans: for each unit, by its number, what was added meanwhile to each of the lists.
    """

    def __init__(self, network: nn.Module) -> None:
        self.units = (unet_blocks if is_unet(network) else dit_blocks)(network)
        self.tracer = Tracer()
        self.spans: dict[int, tuple[range, ...]] = {}
        numbers = {id(unit): number for number, unit in enumerate(self.units)}
        modules = network.named_modules()
        self._paths = {path: numbers[id(module)] for path, module in modules if id(module) in numbers}

    @contextmanager
    def over(self, *lists: Sequence[Any]) -> Iterator[None]:
        """The network is called; units add to `lists`."""

        def call_unit(number: int, forward: Callable[[Inputs], Any], inputs: Inputs) -> Any:
            with self.inside(number, *lists):
                return self.tracer.unit(number, partial(forward, inputs))

        hooks = ForwardHooks(self.units, call_unit)
        try:
            with self.tracer:
                yield
        finally:
            hooks.release()

    @contextmanager
    def inside(self, number: int, *lists: Sequence[Any]) -> Iterator[None]:
        """The unit of this number adds to `lists`; it may do so more than once, but no other in between."""
        starts = [span.start for span in self.spans.get(number, ())] or [len(one) for one in lists]
        yield
        self.spans[number] = tuple(range(start, len(one)) for start, one in zip(starts, lists, strict=True))

    def number_of(self, path: str) -> int:
        """The unit that the module at `path` is part of."""
        parts = path.split(".")
        prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next(self._paths[prefix] for prefix in prefixes if prefix in self._paths)

    def of_units(self, kept: Collection[int], place: int, whole: Sequence[T]) -> list[T]:
        """Of the list at `place` what units in `kept` have added, and what was added outside all units."""
        others = {at for unit, spans in self.spans.items() if unit not in kept for at in spans[place]}
        return [one for at, one in enumerate(whole) if at not in others]
