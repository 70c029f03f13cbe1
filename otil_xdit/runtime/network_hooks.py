"""`NetworkHooks`: the denoising networks of a session's pipelines, hooked from their first generation on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from textwrap import shorten
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from otil_xdit.comm.groups import PatchGroup, UnetGroups
from otil_xdit.exchange.protocol import Communicator
from otil_xdit.hybridiff.controller import CfgController
from otil_xdit.method.config import OtilConfig
from otil_xdit.networks.attention_weights import attention_weights
from otil_xdit.networks.compatibility import ModuleInspector, check_no_gradients
from otil_xdit.networks.compiled import CompiledCalls, check_not_compiled, is_compiled
from otil_xdit.networks.dit.architectures import architecture_of, check_architecture, read_call, token_layout
from otil_xdit.networks.dit.key_plan import KeyPlan
from otil_xdit.networks.dit.keys import DitKeys
from otil_xdit.networks.dit.layer_names import LayerNames, NamedModule
from otil_xdit.networks.dit.token_counts import Rows
from otil_xdit.networks.offload import execution_device
from otil_xdit.networks.unet.control_calls import ControlCalls
from otil_xdit.networks.unet.controlnet import PatchedControlNet, controlnets_in, is_controlnet, why_whole
from otil_xdit.networks.unet.model import Attend, PatchedNetwork, PatchedUNet, SessionProtocol, is_unet
from otil_xdit.runtime.step_caches import StepCaches

LOGGER = logging.getLogger(__name__)

T = TypeVar("T")

NETWORKS = ("transformer", "transformer_2", "unconditional_transformer", "unet")
"""Attributes of a pipeline that may hold a denoising network."""


def networks_of(pipe: Any) -> dict[str, nn.Module]:
    """Return a pipeline's denoising networks by attribute."""
    # torch.compile(network) is a module round the network, whose layers are the ones that count.
    return {name: getattr(net, "_orig_mod", net) for name, net in _held_by(pipe).items()}


def _held_by(pipe: Any) -> dict[str, nn.Module]:
    """Return what a pipeline has for denoising networks, by attribute: they may be in ``torch.compile``."""
    return {name: net for name in NETWORKS if isinstance(net := getattr(pipe, name, None), nn.Module)}


def is_patched(network: Any) -> bool:
    """Tell whether a network's layers are wrapped: U-Nets and ControlNets."""
    return is_unet(network) or is_controlnet(network)


def controlnets_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the ControlNets that the ranks share with the pipeline's U-Net, by attribute; none where one is whole.

    Residuals of several are added up, so all are shared or none.
    """
    found = {name: getattr(net, "_orig_mod", net) for name, net in _held_controlnets(pipe).items()}
    return {} if any(map(why_whole, found.values())) else found


def _held_controlnets(pipe: Any) -> dict[str, nn.Module]:
    """Return what a pipeline round a U-Net has for ControlNets, by attribute: they may be in ``torch.compile``."""
    holder = getattr(pipe, "controlnet", None)
    if not isinstance(holder, nn.Module) or not is_unet(networks_of(pipe).get("unet")):
        return {}
    return controlnets_in("controlnet", holder)


def device_of(networks: Mapping[str, nn.Module]) -> torch.device:
    """Return where a pipeline's networks compute."""
    devices = map(execution_device, networks.values())
    return next((device for device in devices if device is not None), torch.device("cpu"))


class HookedSession(SessionProtocol, Protocol):
    """What the hooks need of a session; `otil_xdit.runtime.session.PatchSession` documents each."""

    communicator: Communicator
    cfg_controller: CfgController
    group: PatchGroup
    splits_text: Callable[[], bool]
    rows: Callable[[], Rows | None]


class NetworkHooks:
    """The hooks of one session.

    A DiT gets forward hooks, and a name for each of its attention calls; U-Nets and ControlNets get patched layers.

    Args:
        session: whose networks they are.
        unets: who shares a U-Net, and the attention across them; None where no pipeline may hold one.
        allow_untested: take DiTs on that nobody has compared with one process.

    Attributes:
        coordinates: a digest of what keys and values are coded in, which follows from the networks' weights.
        foreign: forward hooks of unknown packages on the networks' layers, in words.
        step_caches: of the DiTs.
        keys: tells what the keys of the DiT that computes are made of.
    """

    def __init__(
        self, session: HookedSession, unets: tuple[UnetGroups, Attend] | None, allow_untested: bool = False
    ) -> None:
        self._session, self._unets, self._allow_untested = session, unets, allow_untested
        self.coordinates = self.foreign = ""
        self._names = LayerNames()
        cfg = (0, 1) if unets is None else (unets[0].cfg_rank, unets[0].cfg_degree)
        shares = () if unets is None else unets[0].shares[:: session.group.ulysses_degree]
        self.keys = DitKeys(session.group, cfg, shares)
        self.step_caches = StepCaches(session.group, _timeout(session.group), self.keys, cfg[1])
        self._inspectors: dict[int, ModuleInspector] = {}
        self._handles: dict[int, tuple[nn.Module, list[RemovableHandle | NamedModule]]] = {}
        self._compiled: dict[int, CompiledCalls] = {}
        self._is_bracketed = False
        self._patched: dict[int, PatchedNetwork] = {}
        self._controls = ControlCalls()

    def inspect_wrapped(self, pipe: Any) -> None:
        """Record xDiT's networks as they are: they have the processors that xDiT gave them, and no changes yet."""
        for name, network in networks_of(pipe).items():
            if type(network).__module__.startswith("xfuser."):
                self._inspector_of(name, network)

    def prepare(self, networks: Mapping[str, nn.Module], pipes: Iterable[Any]) -> None:
        """Check the networks, and hook those that are not hooked yet: a pipeline may have been given a new one.

        Args:
            networks: of the pipeline that is called, by attribute, with its ControlNets.
            pipes: all pipelines of the session; networks that are in none of them are let go.

        Raises:
            ValueError: for a network that patches cannot serve.
        """
        pipes = [*pipes]
        self.keep_only({id(net) for pipe in pipes for net in {**networks_of(pipe), **controlnets_of(pipe)}.values()})
        holders = {id(holder): (name, holder) for pipe in pipes for name, holder in _held_by(pipe).items()}
        if self._session.cfg_controller.calls_blocks:
            check_not_compiled(holders.values())
        holders |= {id(holder): (name, holder) for pipe in pipes for name, holder in _held_controlnets(pipe).items()}
        self._controls.clear()
        self.step_caches.find(networks, {name: holder for name, holder in holders.values()})
        for name, network in networks.items():
            self._inspector_of(name, network).check()
            if is_patched(network):
                self._patched_network(name, network).prepare(holder for _, holder in holders.values())
            elif id(network) not in self._handles:
                check_architecture(name, network, self._allow_untested)
                self._session.communicator.observe(None, token_layout(network))
                before = network.register_forward_pre_hook(self._before_forward, with_kwargs=True)
                after = network.register_forward_hook(self._after_forward)
                self._handles[id(network)] = (network, [before, after, *self._names.watch(name, network)])
                self._compiled[id(network)] = CompiledCalls(network, partial(self._call_compiled, network))
            if self.keys.cut.shares and not is_patched(network):
                self._check_unequal(name, network, [holder for _, holder in holders.values()])
            if id(network) in self._compiled:
                self._compiled[id(network)].route(holder for _, holder in holders.values())
        layers = {
            f"{name}/{path}": weights
            for name, network in networks.items()
            for path, weights in attention_weights(network).items()
        }
        self.coordinates = self._session.communicator.set_weights(layers)
        self._tell_foreign_hooks(networks)

    @contextmanager
    def naming(self, networks: Iterable[nn.Module]) -> Iterator[None]:
        """Name attention calls anew for a generation, and follow the names that diffusers gives its passes."""
        self._names.begin()
        self.keys.begin()
        with ExitStack() as stack:
            stack.enter_context(self.step_caches.comparing())
            for network in networks:
                stack.enter_context(self._names.follow_contexts(network))
            yield

    def current_layer(self) -> str:
        """Return the name of the attention call under way.

        Raises:
            ValueError: when no known attention module is under way.
        """
        return self._names.current(self._session.communicator.clock.step)

    def plan_keys(self, key: torch.Tensor) -> KeyPlan:
        """Return what to do with the keys, [B, H, S, D], of the DiT's attention call under way."""
        return self.keys.plan(self._names.path, key.shape[2], key.device)

    def kept_of_gathered(self, keys: int) -> int | None:
        """Return how many of the keys that xDiT itself has gathered for the call under way are real; None for all."""
        return self.keys.kept_of_gathered(self._names.path, keys)

    @property
    def has_whole_masks(self) -> bool:
        """Return whether the masks of the DiT that computes cover the keys of all ranks."""
        return self.keys.has_whole_masks

    @property
    def unet_device(self) -> torch.device | None:
        """Return the device on which the patched U-Nets compute; None where there is none."""
        return next((execution_device(patched.network) for patched in self._patched.values()), None)

    def keep_only(self, kept: set[int]) -> None:
        """Give all networks but those whose `id` is in `kept` back as they were."""
        for _, handles in _take_out(self._handles, kept):
            for handle in handles:
                handle.remove()
        for compiled in _take_out(self._compiled, kept):
            compiled.release()
        self._session.cfg_controller.keep_only(kept)
        for patched in _take_out(self._patched, kept):
            patched.release()
        _take_out(self._inspectors, kept)

    def _check_unequal(self, name: str, network: nn.Module, holders: list[nn.Module]) -> None:
        """Refuse unequal shares of the tokens where a graph hides what their cut depends on."""
        reason = architecture_of(network).why_equal_compiled
        if reason and any(is_compiled(holder) for holder in holders if getattr(holder, "_orig_mod", holder) is network):
            raise ValueError(
                f"patch_shares is not possible for the compiled {name}: {reason}; leave one of the two out"
            )

    def _tell_foreign_hooks(self, networks: Mapping[str, nn.Module]) -> None:
        """Record the forward hooks that others have put on layers, and warn of new ones."""
        found = {
            place: names for name in networks for place, names in self._inspectors[id(networks[name])].hooks.items()
        }
        told = "; ".join(f"{place}: {', '.join(names)}" for place, names in sorted(found.items()))
        if told and told != self.foreign and self._session.group.rank == 0:
            LOGGER.warning(
                "forward hooks see one rank's rows; what they compute across rows is not that of the whole image: %s",
                shorten(told, 300, placeholder=" ..."),
            )
        self.foreign = told

    def _inspector_of(self, name: str, network: nn.Module) -> ModuleInspector:
        if id(network) not in self._inspectors:
            self._inspectors[id(network)] = ModuleInspector(name, network, patched=is_patched(network))
        return self._inspectors[id(network)]

    def _patched_network(self, name: str, network: nn.Module) -> PatchedNetwork:
        if id(network) not in self._patched:
            if self._unets is None:
                raise ValueError("this session was not made for a pipeline with a U-Net")
            arguments = self._session, network, *self._unets, self._controls
            made = PatchedUNet(*arguments) if is_unet(network) else PatchedControlNet(*arguments, name)
            self._patched[id(network)] = made
        return self._patched[id(network)]

    def _call_compiled(
        self, network: nn.Module, compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make the compiled call of a DiT, with the hooks of the network round it: they are no part of its graph."""
        self._before_forward(network, args, kwargs)
        self._is_bracketed = True
        try:
            output = compiled(*args, **kwargs)
        finally:
            self._is_bracketed = False
        self._after_forward(network, args, output)
        return output

    def _before_forward(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the communicator what a DiT's sequence is made of."""
        if torch.compiler.is_compiling() or self._is_bracketed:
            return
        session = self._session
        if session.is_active:
            check_no_gradients(network, *args, *kwargs.values())
            self.keys.read(network, args, kwargs, session.splits_text(), session.rows())
            session.communicator.observe(*read_call(network, args, kwargs, session.group.ulysses_degree))

    def _after_forward(self, network: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Show a DiT's prediction to the controller of the two passes."""
        if torch.compiler.is_compiling() or self._is_bracketed:
            return
        if self._session.is_active:
            found = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)
            if found is not None:
                self._session.cfg_controller.record_own(found)


def _timeout(group: PatchGroup) -> float:
    """Return how many seconds one wait may take."""
    return OtilConfig.timeout if group.detector is None else group.detector.timeout


def _take_out(found: dict[int, T], kept: set[int]) -> list[T]:
    """Remove and return all entries but those of `kept`."""
    return [found.pop(key) for key in [*found] if key not in kept]
