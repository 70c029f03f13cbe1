"""`PatchSession`: ties a communicator to a pipeline: where a generation begins, what a step is, which layer calls.

Nothing of diffusers or xDiT is edited: the pipeline object gets a subclass of its class that brackets ``__call__``, its
networks get forward hooks, and during a generation its scheduler gets a subclass whose ``step`` ticks the clock.
`detach` undoes it all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from otil_xdit.dit.layers import LayerNames
from otil_xdit.dit.layouts import read_call, refuse_unsupported
from otil_xdit.exchange import PatchGroup
from otil_xdit.registry import Communicator
from otil_xdit.schedule import Clock

logger = logging.getLogger(__name__)

NETWORKS = ("transformer", "transformer_2", "unet")
"""Attributes of a pipeline that may hold a denoising network."""

_ACTIVE: ContextVar[PatchSession | None] = ContextVar("otil_xdit_session", default=None)


class PatchSession:
    """One pipeline's use of a communicator.

    Args:
        communicator: made by a strategy's ``connect``.
        group: the ranks that hold the patches.
        finished: called after every generation, with this session.
    """

    def __init__(
        self, communicator: Communicator, group: PatchGroup, finished: Callable[[PatchSession], None] | None = None
    ) -> None:
        self.communicator, self.group = communicator, group
        self._finished = finished
        self._names = LayerNames()
        self._watched: dict[int, tuple[nn.Module, list[RemovableHandle]]] = {}
        self._attached: list[Any] = []

    @staticmethod
    def active() -> PatchSession | None:
        """The session whose generation is under way in this context."""
        return _ACTIVE.get()

    def attach(self, pipe: Any) -> None:
        """Bracket `pipe`'s calls; attaching a pipeline twice, or a wrapper besides what it wraps, is fine.

        Raises:
            ValueError: when another session has it.
        """
        holder = vars(pipe).get("_otil_session")
        if holder is self:
            return
        if holder is not None:
            raise ValueError(f"this {type(pipe).__name__} runs with a parallel strategy already")
        _swap_class(pipe, _bracketed)
        vars(pipe)["_otil_session"] = self
        self._attached.append(pipe)

    def detach(self) -> None:
        """Give every attached pipeline its own class back, remove the hooks, free the buffers."""
        for pipe in self._attached:
            _restore_class(pipe)
            del vars(pipe)["_otil_session"]
        self._attached.clear()
        for _, handles in self._watched.values():
            for handle in handles:
                handle.remove()
        self._watched.clear()
        self.communicator.free()

    def gather(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every patch's keys and values for the attention call under way; see `OtilRun.gather`."""
        return self.communicator.gather(self._names.current(self.communicator.clock.step), key, value)

    @contextmanager
    def generation(self, pipe: Any) -> Iterator[None]:
        """One call of a pipeline; calls inside it (a wrapper calls what it wraps) belong to it."""
        if _ACTIVE.get() is self:
            yield
            return
        networks = {name: net for name in NETWORKS if isinstance(net := getattr(pipe, name, None), nn.Module)}
        token = _ACTIVE.set(self)
        try:
            with ExitStack() as stack:
                self._watch(networks)
                for net in networks.values():
                    stack.enter_context(self._names.follow_contexts(net))
                stack.enter_context(_ticking(getattr(pipe, "scheduler", None), self.communicator.clock))
                self._names.begin()
                self.communicator.begin()
                stack.callback(self.communicator.end)
                yield
        finally:
            _ACTIVE.reset(token)
        if self._finished is not None:
            self._finished(self)

    def _watch(self, networks: dict[str, nn.Module]) -> None:
        """Hook the networks that are not hooked yet; a pipeline may have been given a new one since."""
        for name, net in networks.items():
            if id(net) not in self._watched:
                refuse_unsupported(name, net)
                observe = net.register_forward_pre_hook(self._observe, with_kwargs=True)
                self._watched[id(net)] = (net, [observe, *self._names.watch(name, net)])

    def _observe(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _ACTIVE.get() is self:
            chunks = self.group.ulysses_degree
            self.communicator.observe(*read_call(network, args, kwargs, chunks, chunks * self.group.world_size))


@contextmanager
def _ticking(scheduler: Any, clock: Clock) -> Iterator[None]:
    """Let every `scheduler.step` tick `clock`.

    By class and attribute rather than by a wrapped bound method: some pipelines deep-copy their scheduler, and the
    copy's steps must neither count nor reach the original.
    """
    if scheduler is None:
        yield
        return
    _swap_class(scheduler, _ticked)
    vars(scheduler)["_otil_clock"] = clock
    try:
        yield
    finally:
        _restore_class(scheduler)
        del vars(scheduler)["_otil_clock"]


@cache
def _bracketed(kind: type) -> type:
    @wraps(kind.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._otil_session.generation(self):
            return kind.__call__(self, *args, **kwargs)

    return _same_name(kind, {"__call__": __call__})


@cache
def _ticked(kind: Any) -> type:
    @wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = kind.step(self, *args, **kwargs)
        self._otil_clock.tick()
        return out

    return _same_name(kind, {"step": step})


def _same_name(kind: type, members: dict[str, Any]) -> type:
    """A subclass that code which asks for names (diffusers' save_pretrained, xDiT's checks) takes for `kind`."""
    members = {**members, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "_otil_base": kind}
    return type(kind)(kind.__name__, (kind,), members)


def _swap_class(thing: Any, derive: Callable[[type], type]) -> None:
    _set_class(thing, derive(type(thing)))


def _restore_class(thing: Any) -> None:
    _set_class(thing, type(thing)._otil_base)


def _set_class(thing: Any, kind: type) -> None:
    # Not by assignment: xDiT's scheduler wrappers pass assignments, of __class__ too, on to what they wrap.
    object.__setattr__(thing, "__class__", kind)
