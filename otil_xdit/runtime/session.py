"""`PatchSession`: ties a communicator to a pipeline: where a generation begins, what a step is, which layer calls.

Nothing of diffusers or xDiT is edited: the pipeline object gets a subclass of its class that brackets ``__call__``, its
networks get forward hooks (a U-Net gets patched layers, `otil_xdit.networks.unet`), and during a generation its
scheduler gets a subclass whose ``step`` ticks the clock. `detach` undoes it all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, wraps
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from otil_xdit.comm.groups import PatchGroup, UnetGroups, is_lost_connection, reason_of
from otil_xdit.comm.peer_status import PeerStatus
from otil_xdit.errors import ExchangeTimeout, NotFinite
from otil_xdit.exchange.protocol import Communicator
from otil_xdit.exchange.report import Report
from otil_xdit.hybridiff.controller import CfgController
from otil_xdit.hybridiff.stages import Stages
from otil_xdit.method.grid import TokenLayout
from otil_xdit.networks.class_swap import restore_class, subclass_of, swap_class
from otil_xdit.networks.compatibility import ModuleInspector, check_arguments_are_read, check_no_gradients
from otil_xdit.networks.dit.architectures import check_architecture, read_call, token_layout
from otil_xdit.networks.dit.layer_names import LayerNames
from otil_xdit.networks.dit.layer_names import blocks_of as dit_blocks
from otil_xdit.networks.unet.levels import blocks_of as unet_blocks
from otil_xdit.networks.unet.model import Attend, PatchedUNet, is_unet
from otil_xdit.runtime.agreement import (
    RANDOM_STATE,
    REFUSAL,
    Facts,
    NetworkFacts,
    differences,
    facts_of_call,
    lora_facts,
)
from otil_xdit.runtime.network_hooks import _networks_of, _taken_out
from otil_xdit.runtime.steps import arguments_of, check_scheduler_step, track_steps

logger = logging.getLogger(__name__)

T = TypeVar("T")


_ACTIVE: ContextVar[PatchSession | None] = ContextVar("otil_xdit_session", default=None)


class PatchSession:
    """One pipeline's use of a communicator.

    Args:
        communicator: made by a strategy's ``connect``.
        group: the ranks that hold the patches.
        finished: called after every generation, with this session.
        unets: who shares a U-Net, and the attention across them; None where no pipeline may hold one.
        facts: what else must be equal on all ranks, besides what a pipeline and its calls tell.
    """

    def __init__(
        self,
        communicator: Communicator,
        group: PatchGroup,
        finished: Callable[[PatchSession], None] | None = None,
        unets: tuple[UnetGroups, Attend] | None = None,
        facts: Facts | None = None,
    ) -> None:
        self.communicator, self.group = communicator, group
        self.cfg_controller = CfgController.of(communicator)
        self.kept_keys: torch.Tensor | None = None
        self._layer = ""
        self._finished = finished
        self._unets = unets
        self._facts, self._network_facts = facts or {}, NetworkFacts()
        self._unet_patches: dict[int, PatchedUNet] = {}
        self._names = LayerNames()
        self._watched: dict[int, tuple[nn.Module, list[RemovableHandle]]] = {}
        self._looks: dict[int, ModuleInspector] = {}
        self._attached: list[Any] = []
        self._pipe: Any = None
        self._undo = ExitStack()
        self.surroundings: Callable[[], AbstractContextManager[None]] = nullcontext
        """What a generation is to take place in."""

    @staticmethod
    def active() -> PatchSession | None:
        """The session whose generation is under way in this context."""
        return _ACTIVE.get()

    @property
    def is_active(self) -> bool:
        """Whether a generation of this session is under way in this context."""
        return _ACTIVE.get() is self

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
        swap_class(pipe, _bracketed)
        vars(pipe)["_otil_session"] = self
        self._attached.append(pipe)
        for name, net in _networks_of(pipe).items():
            # Such a network has the processors that xDiT gave it, and nobody has changed them yet.
            if type(net).__module__.startswith("xfuser."):
                self._look_at(name, net)

    def on_detach(self, undo: Callable[[], object]) -> None:
        """Have `undo` called by `detach`, the last one given first."""
        self._undo.callback(undo)

    def detach(self) -> None:
        """Give every attached pipeline its own class back, remove the hooks, free the buffers."""
        for pipe in self._attached:
            restore_class(pipe)
            del vars(pipe)["_otil_session"]
        self._attached.clear()
        self._forget(set())
        self._undo.close()
        self.communicator.free()
        if self.group.detector is not None:
            self.group.detector.close()

    def planned_steps(self) -> int | None:
        """How many steps the pipeline under way says it will do; None where it does not say."""
        planned = vars(self._pipe).get("_num_timesteps") if self._pipe is not None else None
        return planned if isinstance(planned, int) else None

    def report(self) -> Report:
        """Return the counters of the last (or current) generation, for this rank."""
        report, controller = self.communicator.report(), self.cfg_controller
        buffer_bytes = report.buffer_bytes + controller.nbytes
        return replace(report, buffer_bytes=buffer_bytes, discrepancy=controller.curve, window=controller.window.found)

    def gather(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every patch's keys and values for the attention call under way; see `OtilCommunicator.gather`."""
        name = self._layer or self._names.current(self.communicator.clock.step)
        return self.communicator.gather(name, key, value)

    @contextmanager
    def attention(self, name: str, layout: TokenLayout, kept_keys: torch.Tensor | None) -> Iterator[None]:
        """One attention call of a layer that knows its name and its tokens.

        Args:
            name: tells the layer from every other one.
            layout: what this rank's sequence is made of.
            kept_keys: int64, positions of the real ones among all ranks' keys where some are padding; None for all.
        """
        self.communicator.observe(None, layout)
        self._layer, self.kept_keys = name, kept_keys
        try:
            yield
        finally:
            self._layer, self.kept_keys = "", None

    @contextmanager
    def generation(self, pipe: Any, call: Facts | None = None, check: Callable[[], object] = bool) -> Iterator[None]:
        """One call of a pipeline; calls inside it (a wrapper calls what it wraps) belong to it.

        Args:
            call: of its arguments what must be equal on all ranks.
            check: raises `ValueError` for arguments that cannot be served.

        Raises:
            ValueError: on all ranks, when one of them refuses the networks or the call, or when they do not agree.
            ExchangeTimeout: when another rank fails or does not answer.
        """
        if self.is_active:
            yield
            return
        networks = _networks_of(pipe)
        token = _ACTIVE.set(self)
        self._pipe = pipe
        try:
            with ExitStack() as stack, self._told():
                stack.enter_context(self.surroundings())
                scheduler = getattr(pipe, "scheduler", None)
                self._agree(pipe, networks, call or {}, self._refusal(scheduler, networks, check))
                for net in networks.values():
                    stack.enter_context(self._names.follow_contexts(net))
                stack.enter_context(track_steps(scheduler, self.communicator.clock, self._settle, self.planned_steps))
                self._names.begin()
                self.communicator.begin()
                self.cfg_controller.begin()
                stack.callback(self._end_exchange)
                self._begin_halves(networks)
                if self._unet_patches:
                    self._share_random_state()
                yield
                self.communicator.clock.finish()
        finally:
            _ACTIVE.reset(token)
            self._pipe = None
        if self.group.detector is not None:
            self.group.detector.done()
        if self._finished is not None:
            self._finished(self)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A generation, and its end by an exception, of which the other ranks are told.

        They are told before anything of the exchange is waited for, which they might not send any more.
        """
        detector = self.group.detector
        if detector is None:
            yield
            return
        detector.begin()
        try:
            yield
        except ExchangeTimeout:
            raise
        except NotFinite as error:
            raise _with_origin(error, detector.failed(error), detector.rank) from error
        except BaseException as error:
            if not (isinstance(error, RuntimeError) and (detector.is_alarmed or is_lost_connection(error))):
                detector.failed(error)
                raise
            # A collective of xDiT's own.
            place = f"rank {detector.rank}: no answer from the other ranks after {detector.where}"
            raise ExchangeTimeout(f"{place} ({reason_of(error)}); {detector.diagnose()}") from error

    def _refusal(
        self, scheduler: Any, networks: dict[str, nn.Module], check: Callable[[], object]
    ) -> ValueError | None:
        """Get the networks ready; why this rank cannot serve them or the call, None where it can."""
        try:
            check()
            check_scheduler_step(scheduler)
            self._watch(networks)
        except ValueError as error:
            return error
        return None

    def _agree(self, pipe: Any, networks: dict[str, nn.Module], call: Facts, refusal: ValueError | None) -> None:
        """Raise `ValueError` on every rank where one of them refuses, or what must be equal is not."""
        detector = self.group.detector
        if detector is None:
            if refusal is not None:
                raise refusal
            return
        facts = {**self._facts, **self._network_facts.of(pipe, networks), **call}
        if any(is_unet(net) for net in networks.values()):
            facts.pop(RANDOM_STATE, None)  # they are made to draw alike
        if refusal is not None:
            facts[REFUSAL] = str(refusal)
        by_rank = detector.exchange_facts(facts)
        if refusal is not None:
            raise refusal
        # What a rank refuses is often what is different there: the better message of the two.
        refused = [f"rank {rank} refuses: {found[REFUSAL]}" for rank, found in by_rank.items() if REFUSAL in found]
        if refused:
            raise ValueError(f"rank {detector.rank}: {'; '.join(refused)}")
        found = differences(by_rank)
        if found:
            raise ValueError(f"rank {detector.rank}: the ranks do not agree: {found}")

    def _end_exchange(self) -> None:
        detector = self.group.detector
        if detector is None or not detector.why_broken:
            self.cfg_controller.drain()
            self.communicator.end()

    def _watch(self, networks: dict[str, nn.Module]) -> None:
        """Look at the networks and hook those that are not hooked yet: a pipeline may have been given a new one."""
        self._forget({id(net) for pipe in self._attached for net in _networks_of(pipe).values()})
        for name, net in networks.items():
            self._look_at(name, net).check()
            if is_unet(net):
                self._patches_of(net).prepare()
            elif id(net) not in self._watched:
                check_architecture(name, net)
                self.communicator.observe(None, token_layout(net))
                observe = net.register_forward_pre_hook(self._observe, with_kwargs=True)
                saw = net.register_forward_hook(self._saw)
                self._watched[id(net)] = (net, [observe, saw, *self._names.watch(name, net)])

    def _look_at(self, name: str, network: nn.Module) -> ModuleInspector:
        if id(network) not in self._looks:
            self._looks[id(network)] = ModuleInspector(name, network, patched=is_unet(network))
        return self._looks[id(network)]

    def _forget(self, kept: set[int]) -> None:
        """Let go of all networks but those whose `id` is in `kept`."""
        for _, handles in _taken_out(self._watched, kept):
            for handle in handles:
                handle.remove()
        for network in self.cfg_controller.forget(kept):
            if not is_unet(network):
                restore_class(network)
        for patches in _taken_out(self._unet_patches, kept):
            patches.release()
        _taken_out(self._looks, kept)

    def _patches_of(self, unet: nn.Module) -> PatchedUNet:
        found = self._unet_patches.get(id(unet))
        if found is None:
            if self._unets is None:
                raise ValueError("this session was not made for a pipeline with a U-Net")
            found = self._unet_patches[id(unet)] = PatchedUNet(self, unet, *self._unets)
        return found

    def _saw(self, network: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A DiT's prediction; with CFG groups of ranks, `gathered` sees both."""
        if self.is_active and (self._unets is None or self._unets[0].cfg_degree == 1):
            found = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)
            if found is not None:
                self.cfg_controller.guidance.note(found)

    def _settle(self, sample: Any) -> None:
        self.cfg_controller.settle(sample)

    def gathered(self, shown: torch.Tensor | list[torch.Tensor], dim: int, own: torch.Tensor) -> Any:
        """What xDiT has gathered of both CFG groups (see `CfgController.gathered`); this rank sent `own`."""
        self.communicator.count(own, "guidance")
        return self.cfg_controller.gathered(shown, dim)

    def _begin_halves(self, networks: dict[str, nn.Module]) -> None:
        """Put networks in two stages, where the strategy does that, and begin anew."""
        halves = self.cfg_controller
        rows = self.group.rows or self.group
        halves.guidance.has_parts = rows.world_size > 1 and not any(map(is_unet, networks.values()))
        for name, net in networks.items():
            halves.window.is_unet = is_unet(net)
            if halves.has_stages and self._unets is not None and self._unets[0].cfg_degree == 2:
                self._stages_of(name, net, self._unets[0]).begin(lora_facts(name, net))

    def _stages_of(self, name: str, network: nn.Module, groups: UnetGroups) -> Stages:
        """A network's two stages, in which it is put where it has not been."""
        halves, unet = self.cfg_controller, is_unet(network)
        if halves.stages_of(network) is None:
            blocks = unet_blocks(network) if unet else dit_blocks(network)
            halves.join(network, name, blocks, groups.cfg_rank == 1, groups.peer, not unet)
            if not unet:
                swap_class(network, _staged_network)
        stages = halves.stages_of(network)
        assert stages is not None, "it has been put in stages"
        return stages

    def _share_random_state(self) -> None:
        """Let every rank draw as the first one does where a call gives no generator: one image, one noise."""
        states = [torch.get_rng_state()]
        device = next(iter(self._unet_patches.values())).network.device
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        first = [self.communicator.collect(state.to(device), "random-state")[0].cpu() for state in states]
        torch.set_rng_state(first[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(first[1], device)

    def _observe(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_active:
            check_no_gradients(network, *args, *kwargs.values())
            chunks = self.group.ulysses_degree
            self.communicator.observe(*read_call(network, args, kwargs, chunks, chunks * self.group.world_size))


def _with_origin(error: NotFinite, statuses: Mapping[int, PeerStatus], rank: int) -> NotFinite:
    """The error, with the ranks that had it first: what is not finite spreads to all in a step or two."""
    orders = {other: peer.order for other, peer in statuses.items() if peer.order is not None}
    first = min([error.order, *orders.values()])
    origins = [statuses[other].error.partition(": ")[2] for other, order in orders.items() if order == first]
    if first < error.order:
        return NotFinite(f"rank {rank} stops with {'; '.join(origins)}", first)
    return NotFinite(f"{error}{''.join(f'; {origin}' for origin in origins)}", first)


@cache
def _bracketed(kind: type) -> type:
    call = signature(kind.__call__)

    @wraps(kind.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        session: PatchSession = self._otil_session
        if session.is_active:
            return kind.__call__(self, *args, **kwargs)
        wrapped = vars(self).get("module")  # the pipeline, where this is xDiT's wrapper of one

        def check() -> None:
            if wrapped is not None:
                check_arguments_are_read(kind.__call__, type(wrapped).__call__, kwargs)
            session.cfg_controller.check_call(arguments_of(call, (self, *args), kwargs))

        with session.generation(self, facts_of_call(call, (self, *args), kwargs), check):
            return kind.__call__(self, *args, **kwargs)

    return subclass_of(kind, {"__call__": __call__})


@cache
def _staged_network(kind: Any) -> type:
    @wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        session = PatchSession.active()
        if session is None:
            return kind.forward(self, *args, **kwargs)

        def call(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
            return kind.forward(self, *inputs[0], **inputs[1])

        session.cfg_controller.is_staged(self)
        return session.cfg_controller.call(self, call, (args, kwargs))

    return subclass_of(kind, {"forward": forward})
