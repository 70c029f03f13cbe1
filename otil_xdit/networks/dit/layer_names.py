"""Which attention layer is calling: names that are the same on every rank and at every step.

xDiT's `ring_attn` is not told who calls it. Call order alone would mix buffers up when a layer is skipped at some
steps, so forward hooks on the attention modules keep a stack of the modules under way, and the innermost one names the
call. In a compiled network the hooks run once, when its graph is made, and put the module's handle into it
(`otil_xdit.networks.handles`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from otil_xdit.networks.handles import Handle, make_order

_PLACE = "_otil_place"
"""Attribute of a hooked attention module that holds its `AttentionPlace`."""

_under_way: list[AttentionPlace] = []
"""The attention modules under way, outermost first. One for the process, whose pipelines generate one after the other:
what torch.compile traces can read a list, and not which session is active."""


@dataclass(eq=False)
class AttentionPlace:
    """An attention module in a network.

    Attributes:
        network: the pipeline's attribute that holds the network.
        path: of the module in it.
        handle: names the module in a compiled graph; None until `LayerNames.watch` has given it one.
    """

    network: str
    path: str
    handle: Handle | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let the module's call be under way, as it was when the graph was made that runs now."""
        _under_way.append(self)
        try:
            yield
        finally:
            _under_way.remove(self)


class NamedModule:
    """An attention module that knows its place, as its hooks read it, until ``remove``."""

    def __init__(self, module: nn.Module, place: AttentionPlace) -> None:
        self._module = module
        vars(module)[_PLACE] = place

    def remove(self) -> None:
        """Let the module forget its place."""
        vars(self._module).pop(_PLACE, None)


def place_under_way() -> AttentionPlace | None:
    """Return the innermost attention module under way; None where there is none."""
    return _under_way[-1] if _under_way else None


class LayerNames:
    """Names the attention calls of one pipeline's networks.

    A name is ``network/context/module#n``: the network's attribute in the pipeline (Wan 2.2 has two), the name that
    diffusers gives the pass (``cond``, ``uncond``; empty where it gives none), the attention module's path, and how
    many calls that module has made before in this step (separate passes with and without the prompt, a module that
    attends twice).
    """

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()
        self._step = -1
        self._context = ""

    def watch(self, network: str, module: nn.Module) -> list[RemovableHandle | NamedModule]:
        """Hook every attention module below `module`; the handles' ``remove`` undoes it."""
        handles: list[RemovableHandle | NamedModule] = []
        order = make_order()
        for path, child in module.named_modules():
            if is_attention(child):
                place = AttentionPlace(network, path)
                place.handle = Handle.make(place, order)
                handles.append(NamedModule(child, place))
                # Not with always_call, by whose keys torch.compile tells blocks apart: `begin` sees to exceptions.
                handles.append(child.register_forward_pre_hook(_enter))
                handles.append(child.register_forward_hook(_leave))
        return handles

    def begin(self) -> None:
        """Forget the calls of the last generation."""
        _under_way.clear()
        self._calls.clear()
        self._step = -1

    def current(self, step: int) -> str:
        """The name of the attention call under way at `step`.

        Raises:
            ValueError: when no known attention module is under way.
        """
        place = place_under_way()
        if place is None:
            raise ValueError(
                "attention was called outside any attention module that otil-xdit knows, so its buffers cannot be told "
                "apart; this model is not supported with --parallel"
            )
        if step != self._step:
            self._calls.clear()
            self._step = step
        name = f"{place.network}/{self._context}/{place.path}"
        self._calls[name] += 1
        return f"{name}#{self._calls[name] - 1}"

    @property
    def path(self) -> str:
        """The path in its network of the innermost attention module under way; empty where there is none."""
        place = place_under_way()
        return "" if place is None else place.path

    @contextmanager
    def follow_contexts(self, module: nn.Module) -> Iterator[None]:
        """Listen to `module.cache_context(name)`, which diffusers enters round the passes of a step."""
        original = getattr(module, "cache_context", None)
        if original is None:
            yield
            return

        @contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            outer, self._context = self._context, name
            try:
                with original(name, *args, **kwargs):
                    yield
            finally:
                self._context = outer

        vars(module)["cache_context"] = cache_context
        try:
            yield
        finally:
            del vars(module)["cache_context"]


def _enter(module: Any, args: tuple[Any, ...]) -> None:
    _under_way.append(module._otil_place)


def _leave(module: Any, args: tuple[Any, ...], output: Any) -> None:
    if _under_way:
        _under_way.pop()


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a DiT, or of xDiT's wrapper of one: what its lists hold, where that attends."""
    inner = getattr(network, "module", network)
    lists = [child for child in inner.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks if any(map(is_attention, block.modules()))]


def is_attention(module: nn.Module) -> bool:
    """Whether `module` may call attention: diffusers' attention modules carry a processor, others say it by name."""
    kind = type(module).__name__
    return hasattr(module, "processor") or "Attention" in kind or kind.endswith("Attn")
