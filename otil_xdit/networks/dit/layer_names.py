"""Which attention layer is calling: names that are the same on every rank and at every step.

xDiT's `ring_attn` is not told who calls it. Call order alone would mix buffers up when a layer is skipped at some
steps, so forward hooks on the attention modules keep a stack of the modules under way, and the innermost one names the
call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class LayerNames:
    """Names the attention calls of one pipeline's networks.

    A name is ``network/context/module#n``: the network's attribute in the pipeline (Wan 2.2 has two), the name that
    diffusers gives the pass (``cond``, ``uncond``; empty where it gives none), the attention module's path, and how
    many calls that module has made before in this step (separate passes with and without the prompt, a module that
    attends twice).
    """

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._calls: Counter[str] = Counter()
        self._step = -1
        self._context = ""

    def watch(self, network: str, module: nn.Module) -> list[RemovableHandle]:
        """Hook every attention module below `module`; the handles' ``remove`` undoes it."""
        handles = []
        for path, child in module.named_modules():
            if is_attention(child):
                handles += self._watch_one(f"{network}/{{}}/{path}", child)
        return handles

    def begin(self) -> None:
        """Forget the calls of the last generation."""
        self._stack.clear()
        self._calls.clear()
        self._step = -1

    def current(self, step: int) -> str:
        """The name of the attention call under way at `step`.

        Raises:
            ValueError: when no known attention module is under way.
        """
        if not self._stack:
            raise ValueError(
                "attention was called outside any attention module that otil-xdit knows, so its buffers cannot be told "
                "apart; this model is not supported with --parallel"
            )
        if step != self._step:
            self._calls.clear()
            self._step = step
        name = self._stack[-1].format(self._context)
        self._calls[name] += 1
        return f"{name}#{self._calls[name] - 1}"

    @property
    def path(self) -> str:
        """The path in its network of the innermost attention module under way; empty where there is none."""
        return self._stack[-1].split("/", 2)[2] if self._stack else ""

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

    def _watch_one(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        def enter(*_: object) -> None:
            self._stack.append(name)

        def leave(*_: object) -> None:
            if self._stack:
                self._stack.pop()

        # always_call: an exception in the layer must not leave its name behind for the next image.
        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a DiT, or of xDiT's wrapper of one: what its lists hold, where that attends."""
    inner = getattr(network, "module", network)
    lists = [child for child in inner.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks if any(map(is_attention, block.modules()))]


def is_attention(module: nn.Module) -> bool:
    """Whether `module` may call attention: diffusers' attention modules carry a processor, others say it by name."""
    kind = type(module).__name__
    return hasattr(module, "processor") or "Attention" in kind or kind.endswith("Attn")
