"""Which of a network's blocks makes which request: one call of the network, watched block by block."""

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


class BlockWatch:
    """Watches one call of a network and notes which entries of given lists each block has added.

    Args:
        network: a denoising network; its blocks are those that a run in two stages has, in the same order.

    Attributes:
        blocks: of the network.
        tracer: has the operations of the call that was made under `over`.
        spans: for each block, by its number, the entries that it added to each of the lists.
    """

    def __init__(self, network: nn.Module) -> None:
        self.blocks = (unet_blocks if is_unet(network) else dit_blocks)(network)
        self.tracer = Tracer()
        self.spans: dict[int, tuple[range, ...]] = {}
        numbers = {id(block): number for number, block in enumerate(self.blocks)}
        modules = network.named_modules()
        self._paths = {path: numbers[id(module)] for path, module in modules if id(module) in numbers}

    @contextmanager
    def over(self, *lists: Sequence[Any]) -> Iterator[None]:
        """Watch the call of the network that is made inside; its blocks add to `lists`."""

        def call_block(number: int, forward: Callable[[Inputs], Any], inputs: Inputs) -> Any:
            with self.inside(number, *lists):
                return self.tracer.unit(number, partial(forward, inputs))

        hooks = ForwardHooks(self.blocks, call_block)
        try:
            with self.tracer:
                yield
        finally:
            hooks.release()

    @contextmanager
    def inside(self, number: int, *lists: Sequence[Any]) -> Iterator[None]:
        """Let the block of this number add to `lists`: more than once if need be, but no other block in between."""
        starts = [span.start for span in self.spans.get(number, ())] or [len(one) for one in lists]
        yield
        self.spans[number] = tuple(range(start, len(one)) for start, one in zip(starts, lists, strict=True))

    def number_of(self, path: str) -> int:
        """Return the number of the block that the module at `path` is part of."""
        parts = path.split(".")
        prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next(self._paths[prefix] for prefix in prefixes if prefix in self._paths)

    def entries_of(self, blocks: Collection[int], place: int, entries: Sequence[T]) -> list[T]:
        """Return the entries of one list that some blocks have added, and those added outside all blocks.

        Args:
            blocks: numbers of the blocks.
            place: of the list among those that were watched.
            entries: the list.
        """
        others = {at for block, spans in self.spans.items() if block not in blocks for at in spans[place]}
        return [one for at, one in enumerate(entries) if at not in others]
