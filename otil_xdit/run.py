"""`OtilRun`: everything that a generation needs to remember about the exchange between patches.

One object owns it all (buffers, step counter, polling, counters). It is handed to whoever needs it; no module of
this package keeps state of its own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from otil_xdit.borders import Beyond, HaloLayer, MomentsLayer, halo_key, moments_key
from otil_xdit.config import OtilConfig, SmallFreshness
from otil_xdit.exchange import Exchange, ExchangeTimeout, PatchGroup
from otil_xdit.finite import FiniteCheck
from otil_xdit.grid import TokenLayout
from otil_xdit.halves import Halves
from otil_xdit.kv import KVStack
from otil_xdit.parcels import Post
from otil_xdit.picking import Picker
from otil_xdit.schedule import Clock, Mode, Schedule
from otil_xdit.workspace import Workspace

OutOfMemory: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)  # 2.4 has the latter

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """What one rank sent in one generation; bytes as handed to the collectives.

    The figures per step are means over the steps after warm-up: `kv_bytes_per_step` of keys and values, the figure that
    strategies are compared by; `small_bytes_per_step` of a U-Net's halo rows and moments; `output_bytes_per_step` of
    its noise prediction, which is the same whatever the strategy. `waited_seconds` is the host's waiting for messages,
    `exchange_seconds` its time in the calls of the exchange with that waiting; less it, what predicting, picking,
    coding, copying and sending takes. `discrepancy` is the denoising discrepancy of each step (`otil_xdit.guidance`),
    None for one that was not computed with and without the prompt; `window` the window's first step and the one after
    its last, None where there was none.
    """

    steps: int
    warmup_steps: int
    kv_bytes_per_step: float
    small_bytes_per_step: float
    output_bytes_per_step: float
    sent_bytes: dict[str, int]
    messages: dict[str, int]
    waited_seconds: float
    exchange_seconds: float
    buffer_bytes: int
    discrepancy: list[float | None] = field(default_factory=list)
    window: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _timed(call: Callable[Concatenate[OtilRun, P], T]) -> Callable[Concatenate[OtilRun, P], T]:
    """A method of `OtilRun` whose time is added up, and which says what to do where there is no room for buffers."""

    @wraps(call)
    def timed(run: OtilRun, *args: P.args, **kwargs: P.kwargs) -> T:
        started = time.perf_counter()
        try:
            return call(run, *args, **kwargs)
        except RuntimeError as error:  # OutOfMemory is one
            if not _is_out_of_memory(error):
                raise
            raise OutOfMemory(run.no_room(error)) from error
        finally:
            run._spent += time.perf_counter() - started

    return timed


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, OutOfMemory) or "can't allocate memory" in str(error)


class OtilRun:
    """The exchange of one pipeline's patches, over any number of generations.

    Args:
        config: the settings.
        group: the ranks that hold the patches.
        make_exchange: what carries the messages of a group of ranks; arguments as those of `Exchange`.
    """

    def __init__(
        self, config: OtilConfig, group: PatchGroup, make_exchange: Callable[..., Exchange] = Exchange
    ) -> None:
        self.config, self.group = config, group
        self.exchange = make_exchange(group, config.timeout)
        self._rows = make_exchange(group.rows or group, config.timeout, self.exchange.traffic)
        self._post = Post(self._rows, self._room)
        self._replica = make_exchange(group.replica or group, config.timeout, self.exchange.traffic)
        self._spent = 0.0
        self.clock = Clock()
        self._finite = FiniteCheck()
        self.clock.after_step.append(self._look)
        self.halves = Halves(config, self.clock, self._replica, self.collect)
        self._schedule = Schedule.from_config(config)
        # Of halo rows and moments that are a step old; keys and values have one of each layer and step.
        self._gain = 0.0 if config.predict == "none" else config.gain
        self._picker = Picker(config, self.clock, group)
        self._layers: dict[str, tuple[KVStack, int]] = {}
        self.stacks: list[KVStack] = []
        self._called: KVStack | None = None
        self._halos: dict[str, HaloLayer] = {}
        self._moments: dict[str, MomentsLayer] = {}
        self._rooms: dict[torch.device, Workspace] = {}

    def begin(self) -> None:
        """Start a generation: nothing of the last one may show in it."""
        self.end()
        self.clock.reset()
        self._finite.begin()
        self.halves.begin()
        self._spent = 0.0
        self.exchange.traffic.clear()
        self._picker.begin()
        for stack in self.stacks:
            stack.begin()
        for halo in self._halos.values():
            halo.begin()
        for moments in self._moments.values():
            moments.begin()

    def end(self) -> None:
        """Finish what is still under way; also after an exception, before buffers are used again."""
        self._post.drop()
        self.halves.drain()
        for layer in self._all_layers():
            layer.drain()

    def free(self) -> None:
        """Give the buffers back."""
        if self.exchange.group.watch is None or not self.exchange.group.watch.why_broken:
            self.end()
        self._layers.clear()
        self.stacks.clear()
        self._called = None
        self._halos.clear()
        self._moments.clear()
        self._post.free()
        self._picker.free()
        self._rooms.clear()

    def observe(self, latent: torch.Tensor | None, layout: TokenLayout) -> None:
        """Take note of what the network is called with.

        Args:
            latent: this rank's rows of the latent, [B, C, rows, cols], or None where they are not known; the second
                call within a step (a separate pass without the prompt) changes nothing.
            layout: what this rank's attention sequences are made of, until the next call.

        Raises:
            ValueError: where the score that picks sub-blocks means nothing for such small ones. A session shows every
                kind of layer before a generation begins, so that no rank finds out after it has sent something.
        """
        self._picker.observe(latent, layout)

    @_timed
    def gather(self, name: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Everybody's keys and values for one attention call.

        Args:
            name: tells the layer from every other one; equal on all ranks and from step to step.
            key, value: this rank's, [B, H, S, D].

        Returns:
            Two [B, H, N * S, D], to be read before the next call of any layer; this rank's part is fresh.
        """
        self._finite.see(name, key, value)
        stack, layer = self._place(name, key)
        if self._called is not None and self._called is not stack:
            self._called.flush()
        self._called = stack
        visits, step = stack.visits[layer], self.clock.step
        mode = self._mode(visits)
        if mode == "displaced" and self.config.tolerance > 0:
            stack.absorb()
            mode = "fresh" if stack.error(layer) > self.config.tolerance else mode
        if self.config.check and mode != "sync":
            stack.absorb()
            self._compare(stack, layer)
        whole = stack.gather(layer, key, value, mode, step, self._kind("kv", visits))
        heads = whole.unflatten(3, (key.shape[1], -1)).transpose(2, 3)
        return heads[0], heads[1]

    @_timed
    def halo(self, name: str, x: torch.Tensor, above: int, below: int, given: Beyond | None = None) -> torch.Tensor:
        """`x`, [B, C, rows, W], between `above` rows of the rank before and `below` of the one after.

        Zeros stand beyond the edges of the image. `name` as in `gather`; `given` are the rows where they are known
        already (on every rank alike, see `norm_halo`), and no message is sent. Read the result before the next call of
        any layer.
        """
        layer = self._halo_layer(name, x, above, below)
        if given is not None:
            return layer.put(x, given)
        mode = self._small_mode(self.config.halo, layer.visits)
        return layer.widen(x, mode, self.clock.step, self._kind("halo", layer.visits))

    @_timed
    def moments(
        self, name: str, mean: torch.Tensor, var: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole maps' mean and biased variance from this rank's, as far as the settings let it know them.

        Args:
            name: as in `gather`.
            mean, var: float32 [B, G].
            share: [R], every rank's share of the rows.
        """
        self._finite.see(name, var)
        layer = self._moments_layer(name, mean)
        mode = self._small_mode(self.config.moments, layer.visits)
        return layer.combine(mean, var, share, mode, self.clock.step, self._kind("moments", layer.visits))

    @_timed
    def norm_halo(
        self,
        names: tuple[str, str],
        mean: torch.Tensor,
        var: torch.Tensor,
        share: torch.Tensor,
        x: torch.Tensor,
        above: int,
        below: int,
    ) -> tuple[torch.Tensor, torch.Tensor, Beyond] | None:
        """What `moments` gives, and the rows of `x` above and below this rank's, which it waits for together.

        Args:
            names: of the group norm that asks for the moments, and of the convolution that is to read those rows (once
                the norm has made something of them) by `halo`.
            mean, var, share: as in `moments`.
            x: what the norm is given, [B, C, rows, W].
            above, below: number of rows.

        Returns:
            None where the settings have one or both a step late; `moments` and `halo` are then asked apart.
        """
        norm, conv = self._moments_layer(names[0], mean), self._halo_layer(names[1], x, above, below)
        modes = self._small_mode(self.config.moments, norm.visits), self._small_mode(self.config.halo, conv.visits)
        if modes != ("sync", "sync"):
            return None
        self._finite.see(names[0], var)
        kinds = self._kind("moments", norm.visits), self._kind("halo", conv.visits)
        return norm.combine_with_rows(mean, var, share, conv, x, self.clock.step, kinds)

    def _halo_layer(self, name: str, x: torch.Tensor, above: int, below: int) -> HaloLayer:
        layer = self._halos.get(name)
        if layer is None or layer.key != halo_key(x, above, below):
            self._discard(layer)
            room = self._room(x.device)
            coded = self.config.codec != "raw"
            layer = HaloLayer(self._rows, self._post, room, name, x, above, below, self._gain, coded)
            self._halos[name] = layer
        return layer

    def _moments_layer(self, name: str, mean: torch.Tensor) -> MomentsLayer:
        layer = self._moments.get(name)
        if layer is None or layer.key != moments_key(mean):
            self._discard(layer)
            layer = self._moments[name] = MomentsLayer(self._rows, self._post, name, mean, self._gain)
        return layer

    @_timed
    def collect(self, part: torch.Tensor, kind: str = "output") -> torch.Tensor:
        """A tensor of the same shape on every rank that works on the image, from all of them: [N, *part.shape].

        Args:
            part: this rank's, contiguous.
            kind: the counter that the bytes go to, and its name in error messages.
        """
        step = self.clock.step
        if kind == "output":
            self._finite.see("the output", part)
        gathered = part.new_empty(self._replica.group.world_size, *part.shape)
        collected = self._replica.all_gather(part, gathered, self._step_kind(kind), f"the {kind} at step {step}").wait()
        # The network is done: whoever is in the open parcel comes again at the next step only. On a slow link what is
        # waited for must not queue behind it.
        self._post.send()
        return collected

    def count(self, part: torch.Tensor, kind: str) -> None:
        """Count what xDiT itself hands to a collective of its own."""
        self.exchange.traffic.sent[self._step_kind(kind)] += part.nbytes
        self.exchange.traffic.messages[self._step_kind(kind)] += 1

    def _step_kind(self, kind: str) -> str:
        return f"{kind}-warmup" if self.clock.step < self.config.warmup_steps else kind

    def report(self) -> Report:
        """Counters of the last (or current) generation, for this rank."""
        traffic = self.exchange.traffic
        steps = self.clock.step
        after_warmup = max(steps - self.config.warmup_steps, 0)
        return Report(
            steps=steps,
            warmup_steps=min(self.config.warmup_steps, steps),
            kv_bytes_per_step=traffic.sent["kv"] / max(after_warmup, 1),
            small_bytes_per_step=(traffic.sent["halo"] + traffic.sent["moments"]) / max(after_warmup, 1),
            output_bytes_per_step=traffic.sent["output"] / max(after_warmup, 1),
            sent_bytes=dict(traffic.sent),
            messages=dict(traffic.messages),
            waited_seconds=sum(traffic.waited.values()),
            exchange_seconds=self._spent,
            buffer_bytes=sum(
                holder.nbytes for holder in (*self._all_layers(), self._post, self.halves, *self._rooms.values())
            ),
            discrepancy=self.halves.curve,
            window=self.halves.window.found,
        )

    @property
    def rooms(self) -> dict[str, int]:
        """Bytes of each room that all layers use in turn; part of what `report` calls `buffer_bytes`."""
        sizes = Counter[str]()
        for room in self._rooms.values():
            sizes.update(room.sizes)
        return dict(sizes)

    def _look(self, step: int, is_last: bool) -> None:
        """After a step: has another rank given up, and were this one's numbers finite?

        Raises:
            ExchangeTimeout, NotFinite
        """
        watch, group = self.group.watch, self.group
        if watch is not None and watch.is_alarmed:
            raise ExchangeTimeout(f"rank {watch.rank}: given up after step {step}: {watch.blame()}")
        self._finite.look(step, group.rank if watch is None else watch.rank, is_last)

    def no_room(self, error: Exception) -> str:
        """What to say when a buffer cannot be made."""
        reason = str(error).partition("\n")[0]
        return (
            f"rank {self.group.rank} of {self.group.world_size}: no room for the exchange's buffers at step "
            f"{self.clock.step}, which take {self.report().buffer_bytes / 1e6:.1f} MB so far ({reason}); give "
            "--otil_copies small, a smaller picture or batch, --use_cfg_parallel, or --parallel sync, which keeps no "
            "copies (`otil-xdit memory` tells beforehand)"
        )

    def _all_layers(self) -> list[KVStack | HaloLayer | MomentsLayer]:
        return [*self.stacks, *self._halos.values(), *self._moments.values()]

    def _kind(self, what: str, visits: int) -> str:
        """The counter that a layer's bytes go to: those of warm-up steps are kept apart."""
        return f"{what}-warmup" if min(self.clock.step, visits) < self.config.warmup_steps else what

    def _mode(self, visits: int) -> Mode:
        """How a layer that was called `visits` times before exchanges at this step."""
        step, window = self.clock.step, self.halves.window
        return self._schedule.mode(step, visits, self.clock.total, window.holds(step) if window.exists else None)

    def _small_mode(self, freshness: SmallFreshness, visits: int) -> Mode:
        mode = self._mode(visits)
        return "sync" if mode == "fresh" or (mode == "displaced" and freshness == "fresh") else mode

    @staticmethod
    def _discard(layer: HaloLayer | MomentsLayer | None) -> None:
        """Wait for what a layer has under way before its buffers go."""
        if layer is not None:
            layer.drain()

    def _place(self, name: str, key: torch.Tensor) -> tuple[KVStack, int]:
        """The stack of the layer `name`, whose keys are [B, H, S, D], and its place there."""
        batch, heads, tokens, size = key.shape
        shape = torch.Size((2, batch, tokens, heads * size))
        stack, layer = self._layers.get(name, (None, 0))
        if stack is not None and stack.shape == shape and stack.dtype == key.dtype:
            if stack.visits[layer]:
                stack.seal()
            return stack, layer
        if stack is not None:
            self._leave(stack)
        table = self._picker.table(tokens, key.device)
        stack = self.stacks[-1] if self.stacks else None
        if stack is None or not stack.fits(shape, key.dtype, table):
            if stack is not None:
                stack.seal()
            stack = self._new_stack(name, shape, key.dtype, table)
        self._layers[name] = stack, stack.join(name)
        return self._layers[name]

    def _new_stack(self, name: str, shape: torch.Size, dtype: torch.dtype, table: torch.Tensor) -> KVStack:
        self._picker.forget(name)
        room = self._room(table.device)
        stack = KVStack(self.exchange, shape, dtype, table, self.config, self._picker, room)
        self.stacks.append(stack)
        return stack

    def _room(self, device: torch.device) -> Workspace:
        if device not in self._rooms:
            self._rooms[device] = Workspace(device)
        return self._rooms[device]

    def _leave(self, stack: KVStack) -> None:
        """A layer has another shape now: its stack goes, once nothing of it is under way.

        The stack's other layers join others when they are called next, as they would in a run that has just begun:
        otherwise they would keep its buffers, and its name for picking, beside those of the layer that has left.
        """
        stack.drain()
        self.stacks.remove(stack)
        self._layers = {key: place for key, place in self._layers.items() if place[0] is not stack}
        self._called = None if self._called is stack else self._called

    def _compare(self, stack: KVStack, layer: int) -> None:
        """Raise `RuntimeError` on every rank where the ranks' copies of a layer are not the same, bit for bit."""
        step, name = self.clock.step, stack.names[layer]
        digest = torch.stack([_digest(tensor) for tensor in stack.shared_state(layer)])
        everybody = digest.new_empty(self.group.world_size, *digest.shape)
        self.exchange.all_gather(digest, everybody, "check", f"the check of layer {name} at step {step}").wait()
        different = [rank for rank in range(1, self.group.world_size) if not everybody[rank].equal(everybody[0])]
        if different:
            raise RuntimeError(
                f"rank {self.group.rank}: the copies of layer {name} at step {step} on ranks {different} are not those "
                "of rank 0"
            )


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """A number, int64, that tells tensors apart unless by chance: exact, whatever the order of the sum."""
    words = tensor.contiguous().view(-1).view(torch.uint8).long()
    return ((words + 1) * (torch.arange(words.numel(), device=words.device) % 65521 + 1)).sum()
