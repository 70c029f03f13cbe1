"""`PatchSession`: ties a communicator to a pipeline: where a generation begins, what a step is, which layer calls.

Nothing of diffusers or xDiT is edited: the pipeline object gets a subclass of its class that brackets ``__call__``, its
networks get hooks (`otil_xdit.runtime.network_hooks`), and during a generation its scheduler gets a subclass whose
``step`` ticks the clock (`otil_xdit.runtime.steps`). `PatchSession.detach` undoes it all.

Over 300 lines: what brackets a generation and what its layers ask for while it runs are one state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, partial, wraps
from inspect import signature
from typing import Any

import torch
from torch import nn

from otil_xdit.catalog.numbers import CALL_NUMBERS, check_numbers
from otil_xdit.catalog.schedulers import steps_by_the_value
from otil_xdit.comm.groups import PatchGroup, UnetGroups
from otil_xdit.exchange.protocol import Communicator
from otil_xdit.exchange.report import Report
from otil_xdit.hybridiff.controller import CfgController
from otil_xdit.method.grid import TokenLayout
from otil_xdit.networks.class_swap import restore_class, subclass_of, swap_class
from otil_xdit.networks.compatibility import check_arguments_are_read, defaults_of_pipeline
from otil_xdit.networks.dit.key_plan import Kept
from otil_xdit.networks.dit.token_counts import Rows
from otil_xdit.networks.unet.model import Attend, is_unet
from otil_xdit.runtime.agreement import (
    RANDOM_STATE,
    Facts,
    NetworkFacts,
    check_agreement,
    described,
    facts_of_call,
    lora_facts,
    share_random_state,
)
from otil_xdit.runtime.callbacks import (
    CallRules,
    StepCallbacks,
    WholeLatent,
    callbacks_of,
    check_loop_shows,
    whole_latent,
)
from otil_xdit.runtime.dit_attention import DitAttention
from otil_xdit.runtime.failures import tell_failures
from otil_xdit.runtime.network_hooks import NetworkHooks, controlnets_of, device_of, networks_of
from otil_xdit.runtime.steps import arguments_of, check_scheduler_step, planned_steps, track_steps
from otil_xdit.runtime.summary import Summary, summarize
from otil_xdit.runtime.turns import TURN_TIMEOUTS, TURNS
from otil_xdit.runtime.vae_sharing import VaeSharing

_ACTIVE: ContextVar[PatchSession | None] = ContextVar("otil_xdit_session", default=None)

_of_graphs: list[PatchSession] = []
"""The same, at most one, for what torch.compile traces: it cannot read context variables. Generations take turns."""


class PatchSession:
    """One pipeline's use of a communicator.

    Over 200 lines: how a generation begins and ends, and what xDiT's layers ask for meanwhile, share all of its state.

    Args:
        communicator: made by a strategy's ``connect``.
        group: the ranks that hold the patches.
        finished: called after every generation, with this session.
        unets: who shares a U-Net, and the attention across them; None where no pipeline may hold one.
        facts: what else must be equal on all ranks, besides what a pipeline and its calls tell.
        strategy: its name.
        allow_untested: take networks on that nobody has compared with one process.
        vae: shares the rows of a pipeline's VAE among the ranks; None for a VAE that is computed whole.

    Attributes:
        cfg_controller: of the passes with and without the prompt.
        dit: the keys of a DiT's attention calls.
        splits_text: tells whether xDiT's pipeline has shared out the text of the call under way, where pipelines do.
        rows: tells how many rows of latent pixels xDiT's pipeline has shared out, where some of them fill it up.
        surroundings: what a generation is to take place in.
    """

    def __init__(
        self,
        communicator: Communicator,
        group: PatchGroup,
        finished: Callable[[PatchSession], None] | None = None,
        unets: tuple[UnetGroups, Attend] | None = None,
        facts: Facts | None = None,
        strategy: str = "",
        allow_untested: bool = False,
        vae: VaeSharing | None = None,
    ) -> None:
        self.communicator, self.group, self.strategy = communicator, group, strategy
        self._cfg_groups = unets[0] if unets is not None else None
        self.cfg_controller = CfgController(communicator, group, self._cfg_groups, lambda: self.is_active)
        self.surroundings: Callable[[], AbstractContextManager[None]] = nullcontext
        self.splits_text: Callable[[], bool] = bool
        self.rows: Callable[[], Rows | None] = lambda: None
        self._kept_keys: torch.Tensor | None = None
        self._layer, self._finished = "", finished
        self._facts, self._network_facts = facts or {}, NetworkFacts()
        self._hooks = NetworkHooks(self, unets, allow_untested)
        self.dit = DitAttention(communicator, self._hooks)
        self._attached: list[Any] = []
        self._vae = vae
        self._pipe: Any = None
        self._undo = ExitStack()

    @staticmethod
    def active() -> PatchSession | None:
        """Return the session whose generation is under way in this context."""
        if torch.compiler.is_compiling():
            return _of_graphs[0] if _of_graphs else None
        return _ACTIVE.get()

    @property
    def is_active(self) -> bool:
        """Return whether a generation of this session is under way in this context."""
        return _ACTIVE.get() is self

    @property
    def is_attached(self) -> bool:
        """Return whether a pipeline may generate with this session."""
        return bool(self._attached)

    # ---- pipelines -------------------------------------------------------------------------------------------------

    def attach(self, pipe: Any, rules: CallRules | None = None) -> None:
        """Bracket `pipe`'s calls; attaching a pipeline twice, or a wrapper besides what it wraps, is fine.

        Args:
            rules: of a wrapper's calls.

        Raises:
            ValueError: when another session has it.
        """
        holder = vars(pipe).get("_otil_session")
        if holder is self:
            return
        if holder is not None:
            raise ValueError(f"this {type(pipe).__name__} runs with a parallel strategy already")
        swap_class(pipe, _bracketed)
        vars(pipe).update(_otil_session=self, _otil_rules=rules)
        self._attached.append(pipe)
        self._hooks.inspect_wrapped(pipe)

    def on_detach(self, undo: Callable[[], object]) -> None:
        """Have `undo` called by `detach`, the last one given first."""
        self._undo.callback(undo)

    def detach(self) -> None:
        """Give every attached pipeline its own class back, remove the hooks, free the buffers."""
        for pipe in self._attached:
            restore_class(pipe)
            del vars(pipe)["_otil_session"], vars(pipe)["_otil_rules"]
        self._attached.clear()
        self._hooks.keep_only(set())
        if self._vae is not None:
            self._vae.release()
        self._undo.close()
        self.communicator.free()
        if self.group.detector is not None:
            self.group.detector.close()

    def report(self) -> Report:
        """Return the counters of the last (or current) generation, for this rank."""
        report, controller = self.communicator.report(), self.cfg_controller
        report = report if self._vae is None else self._vae.added_to(report)
        buffer_bytes = report.buffer_bytes + controller.nbytes
        return replace(report, buffer_bytes=buffer_bytes, discrepancy=controller.curve, window=controller.window.found)

    def summary(self, pipe: Any) -> Summary:
        """Return what this session does to one of its pipelines."""
        return summarize(pipe, self.strategy, self.group, self._cfg_groups, self.report(), self._vae)

    # ---- what xDiT's layers ask for --------------------------------------------------------------------------------

    def gather(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return every patch's keys and values for the attention call under way; see `OtilCommunicator.gather`."""
        return self.communicator.gather(self._layer, key, value) if self._layer else self.dit.gather(key, value)

    @property
    def kept_keys(self) -> Kept | None:
        """Return the positions of the real keys of the attention call under way, to be asked for once; None for all."""
        return self._kept_keys if self._layer else self.dit.take_kept()

    @contextmanager
    def attention(self, name: str, layout: TokenLayout, kept_keys: torch.Tensor | None) -> Iterator[None]:
        """Bracket one attention call of a layer that knows its name and its tokens.

        Args:
            name: tells the layer from every other one.
            layout: what this rank's sequence is made of.
            kept_keys: int64, positions of the real ones among all ranks' keys where some are padding; None for all.
        """
        self.communicator.observe(None, layout)
        self._layer, self._kept_keys = name, kept_keys
        try:
            yield
        finally:
            self._layer, self._kept_keys = "", None

    def record_gathered(self, predictions: torch.Tensor | list[torch.Tensor], dim: int, own: torch.Tensor) -> Any:
        """Record the predictions of both CFG groups, which xDiT has gathered; see `CfgController.record_gathered`.

        Args:
            own: what this rank sent.
        """
        self.communicator.count(own, "guidance")
        return self.cfg_controller.record_gathered(predictions, dim)

    # ---- a generation ----------------------------------------------------------------------------------------------

    @contextmanager
    def generation(
        self, pipe: Any, call: Facts | None = None, check: Callable[[], object] = bool
    ) -> Iterator[StepCallbacks | None]:
        """Bracket one call of a pipeline; calls inside it (a wrapper calls what it wraps) belong to it.

        Args:
            call: of its arguments what must be equal on all ranks.
            check: raises `ValueError` for arguments that cannot be served.

        Yields:
            What is to be put into the call's arguments where a rank is given a callback; None where none is.

        Raises:
            ValueError: on all ranks, when one of them refuses the networks or the call, or when they do not agree.
            ExchangeTimeout: when another rank fails or does not answer.
        """
        if self.is_active:
            yield None
            return
        with self._turn(pipe) if _ACTIVE.get() is None else nullcontext():
            token = _ACTIVE.set(self)
            _of_graphs.append(self)
            self._pipe = pipe
            try:
                with tell_failures(self.group.detector), self.surroundings():
                    networks, collect = networks_of(pipe), self.communicator.collect
                    whole = whole_latent(vars(pipe).get("_otil_rules"), self._cfg_groups, collect, self.rows)
                    by_rank = self._agree(networks, call or {}, check)
                    if self._vae is not None:
                        self._vae.agree(by_rank)
                    with self._exchange(networks, whole):
                        callbacks = callbacks_of(by_rank, collect, whole, self._vae)
                        yield callbacks
                        # First what another rank may be computing already: where it decodes alone, it is in its call.
                        if self._vae is not None:
                            self._vae.finish()
                        if callbacks is not None:
                            callbacks.check_alike(device_of(networks))
                        self.communicator.clock.finish()
            finally:
                _of_graphs.remove(self)
                _ACTIVE.reset(token)
                self._pipe = None
            if self.group.detector is not None:
                self.group.detector.done()
            if self._finished is not None:
                self._finished(self)

    def _turn(self, pipe: Any) -> AbstractContextManager[None]:
        """Return a bracket that waits for this call's turn."""
        timeout = self.group.detector.timeout if self.group.detector is not None else math.inf
        return TURNS.take(type(pipe).__name__, TURN_TIMEOUTS * timeout)

    def _agree(
        self, networks: Mapping[str, nn.Module], call: Facts, check: Callable[[], object]
    ) -> Mapping[int, Facts]:
        """Get the networks ready, and return all ranks' facts; `ValueError` on every rank where these differ."""
        refusal, controls = None, controlnets_of(self._pipe)
        networks = {**networks, **controls}
        try:
            check()
            check_scheduler_step(getattr(self._pipe, "scheduler", None))
            self._hooks.prepare(networks, self._attached)
        except ValueError as error:
            refusal = error
        if self.group.detector is None:  # the facts, which take time, would be compared with nobody's
            return check_agreement(None, {}, refusal)
        facts = {**self._facts, **self._network_facts.of(self._pipe, networks), **call}
        facts["the coordinates of keys and values"] = self._hooks.coordinates
        facts |= self._hooks.step_caches.facts
        facts["forward hooks of layers"] = described(self._hooks.foreign) or ""
        if any(map(is_unet, networks.values())):
            facts.pop(RANDOM_STATE, None)  # they are made to draw alike
            facts["the ControlNets on patches"] = ", ".join(controls)
        if self._vae is not None:
            rules: CallRules | None = vars(self._pipe).get("_otil_rules")
            by_last = rules is not None and rules.decodes_last
            facts |= self._vae.begin(getattr(self._pipe, "vae", None), lambda: self.is_active, by_last)
        return check_agreement(self.group.detector, facts, refusal)

    @contextmanager
    def _exchange(self, networks: Mapping[str, nn.Module], whole: WholeLatent | None) -> Iterator[None]:
        """Bracket the steps of a generation."""
        clock, scheduler = self.communicator.clock, getattr(self._pipe, "scheduler", None)
        steps = track_steps(scheduler, clock, self.cfg_controller.end_step, partial(planned_steps, self._pipe), whole)
        with self._hooks.naming(networks.values()), steps:
            self.communicator.begin()
            self.cfg_controller.begin()
            try:
                self.cfg_controller.begin_networks(networks, lora_facts)
                if self._hooks.unet_device is not None:
                    share_random_state(self.communicator, self._hooks.unet_device)
                elif whole is not None and not steps_by_the_value(scheduler, {}):
                    share_random_state(self.communicator, device_of(networks))
                yield
            finally:
                if self.group.detector is None or not self.group.detector.why_broken:
                    self.cfg_controller.wait()
                    self.communicator.end()


@cache
def _bracketed(kind: type) -> type:
    call = signature(kind.__call__)
    names = [*call.parameters][1:]  # without self

    @wraps(kind.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        session: PatchSession = self._otil_session
        if session.is_active:
            return kind.__call__(self, *args, **kwargs)
        wrapped = vars(self).get("module")  # the pipeline, where this is xDiT's wrapper of one
        if wrapped is not None:
            others = defaults_of_pipeline(kind.__call__, type(wrapped).__call__)
            kwargs = {**{name: others[name] for name in others.keys() - {*names[: len(args)]}}, **kwargs}

        def check() -> None:
            arguments = arguments_of(call, (self, *args), kwargs)
            check_numbers(arguments, CALL_NUMBERS)
            if wrapped is not None:
                check_arguments_are_read(kind.__call__, type(wrapped).__call__, kwargs)
            rules: CallRules | None = vars(self).get("_otil_rules")
            if rules is not None:
                rules.check(self, arguments)
            else:
                check_loop_shows(kind, arguments)
            session.cfg_controller.check_call(arguments)

        with session.generation(self, facts_of_call(call, (self, *args), kwargs), check) as callbacks:
            if callbacks is None:
                return kind.__call__(self, *args, **kwargs)
            whole_args, whole_kwargs = callbacks.put_into(call, (self, *args), kwargs)
            return kind.__call__(*whole_args, **whole_kwargs)

    return subclass_of(kind, {"__call__": __call__})
