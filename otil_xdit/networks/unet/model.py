"""`PatchedUNet`: a whole `UNet2DConditionModel` on patches; `PatchedNetwork`: what it shares with a ControlNet.

The pipeline calls the U-Net with the whole latent on every rank and gets the whole noise prediction on every rank. In
between each rank runs the network on its rows, and on its half of the batch where CFG parallelism is on.

Over 300 lines: what layers ask a network for, and the U-Net's own pass, are one state.

Shapes: B batch, C channels, H x W the latent, h rows of this rank, S tokens of this rank, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import cache, partial, wraps
from inspect import Signature, signature
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput
from torch import nn
from torch.nn import functional

from otil_xdit.comm.groups import UnetGroups
from otil_xdit.exchange.halo import HaloRows, halo_key
from otil_xdit.exchange.protocol import Communicator
from otil_xdit.method.grid import TokenLayout
from otil_xdit.method.kernels import is_fused
from otil_xdit.networks.class_swap import is_swapped, subclass_of, swap_class
from otil_xdit.networks.compatibility import check_adapter, check_no_gradients
from otil_xdit.networks.compiled import CompiledCalls
from otil_xdit.networks.handles import make_order
from otil_xdit.networks.offload import follow_class
from otil_xdit.networks.unet.compatibility import (
    check_arguments,
    check_freeu,
    check_heads,
    check_layers,
    check_supported,
)
from otil_xdit.networks.unet.context import CONTEXT, LayerContext
from otil_xdit.networks.unet.control_calls import ControlCalls
from otil_xdit.networks.unet.conv import halo_rows
from otil_xdit.networks.unet.layers import spatial_layers, unwrap_layer, wrap_layer
from otil_xdit.networks.unet.levels import Levels
from otil_xdit.networks.unet.norm_conv import (
    PrefetchedHalo,
    find_norm_conv_pairs,
    forget_activated,
    wrap_activation,
)
from otil_xdit.networks.unet.sharding import UNetSharding
from otil_xdit.networks.unet.text_cache import TextCache

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention over the Ulysses group and the patches: queries, keys and values [B, heads, S, d] to [B, heads, S, d]."""


class PassProtocol(Protocol):
    """Which of guidance's two passes this rank computes; `otil_xdit.hybridiff.controller.CfgController` documents
    each method."""

    @property
    def calls_blocks(self) -> bool: ...
    def begin_call(self, network: Any) -> bool: ...
    def call(self, network: Any, call: Callable[[Any], Any], inputs: Any) -> Any: ...
    def record_prediction(self, prediction: torch.Tensor) -> torch.Tensor: ...


class SessionProtocol(Protocol):
    """The pipeline's session, as far as a U-Net needs it; `otil_xdit.runtime.session.PatchSession` documents each."""

    communicator: Communicator
    cfg_controller: PassProtocol

    @property
    def is_active(self) -> bool: ...
    def attention(
        self, name: str, layout: TokenLayout, kept_keys: torch.Tensor | None
    ) -> AbstractContextManager[None]: ...


def is_unet(network: Any) -> bool:
    """Tell whether a network is run by `PatchedUNet`; which U-Nets that can serve is another question."""
    return isinstance(network, UNet2DConditionModel)


class PatchedNetwork:
    """One network of a U-Net's layers, which reach the other ranks; subclasses have its `forward`.

    Args:
        session: the pipeline's.
        network: its layers are wrapped by `prepare`.
        groups: the ranks that share it.
        attend: attention across the ranks.
        name: the pipeline's attribute that holds it; tells its layers from those of other networks.

    Raises:
        ValueError: naming what of the network patches cannot serve.
    """

    def __init__(
        self, session: SessionProtocol, network: Any, groups: UnetGroups, attend: Attend, name: str = "unet"
    ) -> None:
        check_supported(network)
        self.session, self.network, self.groups, self.name = session, network, groups, name
        self.running = self.is_under_way = False
        self.order = make_order()
        self.text_cache = TextCache()
        self._compiled = CompiledCalls(network, self.call)
        self._attend = attend
        self._levels = Levels(network)
        self._sharding: UNetSharding | None = None
        self._step, self._calls = -1, 0
        self._prefetched: PrefetchedHalo | None = None

    @property
    def is_active(self) -> bool:
        """Tell whether the pipeline that the network belongs to is generating."""
        return self.session.is_active

    @property
    def is_last(self) -> bool:
        """Tell whether this rank holds the image's lowest rows."""
        return self.groups.rows.rank == self.groups.rows.world_size - 1

    def prepare(self, holders: Iterable[nn.Module] = ()) -> None:
        """Wrap the network and its layers, those too that are new since the last time (LoRA); forget the text.

        Args:
            holders: what pipelines hold in place of networks, this one in ``torch.compile`` among them perhaps.

        Raises:
            ValueError: naming the layer that patches cannot serve, or the setting that means nothing at its resolution.
        """
        if not is_swapped(self.network):
            swap_class(self.network, _patched)
        vars(self.network)[CONTEXT] = LayerContext(self, "", 0)
        self._compiled.route(holders)
        check_layers(self.network)
        pairs, levels = find_norm_conv_pairs(self.network), set[int]()
        for path, module in self.network.named_modules() if self.groups.rows.world_size > 1 else ():
            check_adapter(f"{self.name}.{path}", module)
        for path, module in spatial_layers(self.network).items():
            level = self._levels.of(path)
            wrap_layer(module, LayerContext(self, path, level, pairs.get(path), self.text_cache))
            check_heads(path, module, self.groups.ulysses_degree)
            if isinstance(module, Attention) and not module.is_cross_attention:
                levels.add(level)
        for pair in pairs.values():
            wrap_activation(pair.activation)
        for level in levels if self.groups.rows.world_size > self.groups.ulysses_degree else ():
            self.session.communicator.observe(None, TokenLayout(pixels=2**level))
        follow_class(self.network)
        self.text_cache.clear()
        self._step = -1

    def release(self) -> None:
        """Give the network its own layers back."""
        self._compiled.release()
        for module in self.network.modules():
            unwrap_layer(module)
            forget_activated(module)
        follow_class(self.network)
        self.text_cache.clear()

    # ---- what layers ask for: see `LayerExchange` ------------------------------------------------------------------

    def prefetched_halo(self, context: LayerContext, x: torch.Tensor, above: int, below: int) -> HaloRows | None:
        """Return the neighbours' rows for a convolution, if its group norm has fetched them."""
        prefetched, self._prefetched = self._prefetched, None
        rows = None if prefetched is None else prefetched.rows_for(context.name, x, above, below)
        if prefetched is not None and rows is not None and not prefetched.is_consumed:
            self._prefetched = prefetched
        return rows

    def halo(
        self, context: LayerContext, x: torch.Tensor, above: int, below: int, precomputed: HaloRows | None
    ) -> torch.Tensor:
        """Return `x` with the neighbours' rows above and below it."""
        self._current_sharding().check_halo(context.name, context.level, above, below)
        return self.session.communicator.halo(self._call_name(context.name), x, above, below, precomputed)

    def room_for(self, context: LayerContext, x: torch.Tensor) -> torch.Tensor | None:
        """Return where the activated output of a norm may be written."""
        pair = context.pair
        if pair is None or not is_fused(x) or not pair.is_intact() or not pair.hands_over:
            return None
        return self.session.communicator.room_for(self._call_name(pair.conv_name), x, *halo_rows(pair.conv))

    def moments(
        self, context: LayerContext, mean: torch.Tensor, var: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the moments of whole maps from those of this rank's rows."""
        self._prefetched = None
        shares = self._current_sharding().row_shares(context.level, mean.device)
        return self.session.communicator.moments(self._call_name(context.name), mean, var, shares)

    def norm_halo(
        self, context: LayerContext, mean: torch.Tensor, var: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, HaloRows | None]:
        """Return `moments`, and the neighbours' rows of the norm's input that its convolution needs."""
        assert context.pair is not None, "only a norm with a pair asks for rows"
        if not context.pair.is_intact():
            return *self.moments(context, mean, var), None
        above, below = halo_rows(context.pair.conv)
        sharding = self._current_sharding()
        sharding.check_halo(context.pair.reader_name, context.level, above, below)
        names = self._call_name(context.name), self._call_name(context.pair.conv_name)
        shares = sharding.row_shares(context.level, mean.device)
        found = self.session.communicator.norm_halo(names, mean, var, shares, x, above, below)
        return (*self.moments(context, mean, var), None) if found is None else found

    def prefetch_halo(self, context: LayerContext, x: torch.Tensor, rows: HaloRows) -> None:
        """Keep rows for the convolution of a norm's pair."""
        assert context.pair is not None, "only a norm with a pair has rows for it"
        self._prefetched = PrefetchedHalo(context.pair, rows, halo_key(x, *halo_rows(context.pair.conv)))

    def attend(
        self, context: LayerContext, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attend from this rank's tokens to those of all ranks, whose rows are padded to as many as any rank has."""
        self._prefetched = None
        sharding, tokens = self._current_sharding(), query.shape[2]
        layout = sharding.token_layout(context.level)
        kept_keys = sharding.kept_keys(context.level, query.device)
        if layout.image_tokens > tokens:
            padding = (0, 0, 0, layout.image_tokens - tokens)
            query, key, value = (functional.pad(part, padding) for part in (query, key, value))
        with self.session.attention(self._call_name(context.name), layout, kept_keys):
            return self._attend(query, key, value)[:, :, :tokens]

    def call(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the network.

        Args:
            plain: what it would do by itself: its own `forward`, or that compiled.
            args, kwargs: of the call.
        """
        if not self.is_active:
            return plain(*args, **kwargs)
        arguments = _signature_of(self.network.__class__).bind(*args, **kwargs).arguments

        def as_tuple(latent: torch.Tensor, **others: Any) -> Any:
            return plain(latent, **others, return_dict=False)

        return self.forward(as_tuple, **arguments)

    def forward(self, plain: Callable[..., Any], sample: torch.Tensor, **kwargs: Any) -> Any:
        """Compute this rank's part of what `plain`, the network's own `forward`, gives for the whole latent."""
        raise NotImplementedError

    def _count_call(self) -> None:
        """Count the network's calls within a step, each of which has buffers of its own."""
        step = self.session.communicator.clock.step
        self._calls = self._calls + 1 if step == self._step else 0
        self._step = step

    def _call_name(self, layer: str) -> str:
        return f"{self.name}/{layer}#{self._calls}"

    def _current_sharding(self) -> UNetSharding:
        assert self._sharding is not None, "layers ask for other ranks' part during a patched pass only"
        return self._sharding


class PatchedUNet(PatchedNetwork):
    """One U-Net whose layers reach the other ranks.

    Args:
        controls: the ControlNets of its pipeline, which give it residuals; others as of `PatchedNetwork`.
    """

    def __init__(
        self,
        session: SessionProtocol,
        network: Any,
        groups: UnetGroups,
        attend: Attend,
        controls: ControlCalls | None = None,
    ) -> None:
        super().__init__(session, network, groups, attend)
        self._controls = controls or ControlCalls()

    def prepare(self, holders: Iterable[nn.Module] = ()) -> None:
        check_freeu(self.network)
        super().prepare(holders)

    def forward(self, plain: Callable[..., Any], sample: torch.Tensor, **kwargs: Any) -> Any:
        """Compute what the network's own `forward` gives for the whole latent, on all ranks together.

        Args:
            plain: the network's own `forward`, which returns a tuple.
            sample: the whole latent, [B, C, H, W].
            kwargs: what else the network is called with.

        Returns:
            The whole prediction, [B, C, H, W], as diffusers' output or in a tuple (`return_dict`).

        Raises:
            ValueError: for arguments that patches cannot serve, and sizes that the ranks cannot share.
        """
        check_arguments(kwargs)
        check_no_gradients(self.network, sample, *kwargs.values())
        return_dict = kwargs.pop("return_dict", True)
        communicator, cfg_controller = self.session.communicator, self.session.cfg_controller
        # In two stages both segments are of the pass with the prompt, which the last CFG group computes.
        is_staged = cfg_controller.begin_call(self.network)
        cfg_rank = self.groups.cfg_degree - 1 if is_staged else self.groups.cfg_rank
        sharding = UNetSharding.of(sample, self._levels.count, self.groups, cfg_rank)
        self._controls.take(sharding)
        self._count_call()
        latent = sharding.rows_of(sharding.images_of(sample))
        communicator.observe(latent, sharding.token_layout(0))
        # CFG parallelism alone cuts no rows: the layers have everything they need.
        self._sharding, self.running, self.is_under_way = sharding, self.groups.rows.world_size > 1, True
        try:
            arguments = {name: sharding.argument(name, value) for name, value in kwargs.items()}
            inputs = {"latent": latent, **arguments}
            (part,) = cfg_controller.call(self.network, lambda given: plain(**given), inputs)
        finally:
            self._sharding, self._prefetched, self.running, self.is_under_way = None, None, False, False
        whole = sharding.join(communicator.collect(sharding.padded(part)), part)
        whole = cfg_controller.record_prediction(whole)
        return UNet2DConditionOutput(sample=whole) if return_dict else (whole,)


@cache
def _signature_of(kind: Any) -> Signature:
    """Return the signature of a network's own `forward`, without the network."""
    call = signature(kind.forward)
    return call.replace(parameters=[*call.parameters.values()][1:])


@cache
def _patched(kind: Any) -> type:
    @wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched: PatchedNetwork = self._otil_context.exchange
        if torch.compiler.is_compiling() or patched.is_under_way:  # its compiled call, which `call` makes
            return kind.forward(self, *args, **kwargs)
        return patched.call(partial(kind.forward, self), args, kwargs)

    return subclass_of(kind, {"forward": forward})
