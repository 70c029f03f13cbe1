"""`OtilCommunicator`: everything that a generation needs to remember about the exchange between patches.

One object owns it all (buffers, step counter, polling, counters). It is handed to whoever needs it; no module of
this package keeps state of its own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch

from otil_xdit.comm.collectives import Collectives
from otil_xdit.comm.finite_check import FiniteCheck
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.errors import ExchangeTimeout
from otil_xdit.exchange.buckets import Bucketer
from otil_xdit.exchange.halo import HaloLayer, HaloRows, halo_key
from otil_xdit.exchange.kv import KVGroup
from otil_xdit.exchange.moments import MomentsLayer, moments_key
from otil_xdit.exchange.report import Report
from otil_xdit.method.config import OtilConfig, SmallFreshness
from otil_xdit.method.grid import TokenLayout
from otil_xdit.method.schedule import Clock, Mode, Schedule
from otil_xdit.method.scratch import ScratchBuffers
from otil_xdit.method.selection import BlockSelector
from otil_xdit.method.window import Window

OutOfMemory: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)  # 2.4 has the latter

P = ParamSpec("P")
T = TypeVar("T")


def _timed(call: Callable[Concatenate[OtilCommunicator, P], T]) -> Callable[Concatenate[OtilCommunicator, P], T]:
    """A method of `OtilCommunicator` whose time is added up, and which says what to do where there is no room for
    buffers."""

    @wraps(call)
    def timed(run: OtilCommunicator, *args: P.args, **kwargs: P.kwargs) -> T:
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


class OtilCommunicator:
    """The exchange of one pipeline's patches, over any number of generations.

    Args:
        config: the settings.
        group: the ranks that hold the patches.
        make_exchange: what carries the messages of a group of ranks; arguments as those of `Collectives`.
    """

    def __init__(
        self, config: OtilConfig, group: PatchGroup, make_collectives: Callable[..., Collectives] = Collectives
    ) -> None:
        self.config, self.group = config, group
        self.collectives = make_collectives(group, config.timeout)
        self._rows = make_collectives(group.rows or group, config.timeout, self.collectives.traffic)
        self._bucketer = Bucketer(self._rows, self._scratch)
        self.replica_collectives = make_collectives(group.replica or group, config.timeout, self.collectives.traffic)
        self._spent = 0.0
        self.clock = Clock()
        self._finite = FiniteCheck()
        self.clock.after_step.append(self._look)
        self.window = Window(config.window_settings)
        self._schedule = Schedule.from_config(config)
        # Of halo rows and moments that are a step old; keys and values have one of each layer and step.
        self._gain = 0.0 if config.extrapolation == "none" else config.extrapolation_gain
        self._picker = BlockSelector(config, self.clock, group.rank, group.ulysses_degree)
        self._layers: dict[str, tuple[KVGroup, int]] = {}
        self.stacks: list[KVGroup] = []
        self._called: KVGroup | None = None
        self._halos: dict[str, HaloLayer] = {}
        self._moments: dict[str, MomentsLayer] = {}
        self._scratch_buffers: dict[torch.device, ScratchBuffers] = {}

    def begin(self) -> None:
        """Start a generation: nothing of the last one may show in it."""
        self.end()
        self.clock.reset()
        self._finite.begin()
        self.window.begin()
        self._spent = 0.0
        self.collectives.traffic.clear()
        self._picker.begin()
        for stack in self.stacks:
            stack.begin()
        for halo in self._halos.values():
            halo.begin()
        for moments in self._moments.values():
            moments.begin()

    def end(self) -> None:
        """Finish what is still under way; also after an exception, before buffers are used again."""
        self._bucketer.drop()
        for layer in self._all_layers():
            layer.drain()

    def free(self) -> None:
        """Give the buffers back."""
        if self.collectives.group.detector is None or not self.collectives.group.detector.why_broken:
            self.end()
        self._layers.clear()
        self.stacks.clear()
        self._called = None
        self._halos.clear()
        self._moments.clear()
        self._bucketer.free()
        self._picker.clear()
        self._scratch_buffers.clear()

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
        self._finite.record(name, key, value)
        stack, layer = self._place(name, key)
        if self._called is not None and self._called is not stack:
            self._called.flush()
        self._called = stack
        num_calls, step = stack.num_calls[layer], self.clock.step
        mode = self._mode(num_calls)
        if mode == "displaced" and self.config.tolerance > 0:
            stack.absorb()
            mode = "fresh" if stack.error(layer) > self.config.tolerance else mode
        if self.config.check and mode != "sync":
            stack.absorb()
            self._compare(stack, layer)
        whole = stack.gather(layer, key, value, mode, step, self._kind("kv", num_calls))
        heads = whole.unflatten(3, (key.shape[1], -1)).transpose(2, 3)
        return heads[0], heads[1]

    @_timed
    def halo(
        self, name: str, x: torch.Tensor, above: int, below: int, precomputed: HaloRows | None = None
    ) -> torch.Tensor:
        """`x`, [B, C, rows, W], between `above` rows of the rank before and `below` of the one after.

        Zeros stand beyond the edges of the image. `name` as in `gather`; `precomputed` are the rows where they are
        known already (on every rank alike, see `norm_halo`), and no message is sent. Read the result before the next
        call of any layer.
        """
        layer = self._halo_layer(name, x, above, below)
        if precomputed is not None:
            return layer.put(x, precomputed)
        mode = self._small_mode(self.config.halo, layer.num_calls)
        return layer.widen(x, mode, self.clock.step, self._kind("halo", layer.num_calls))

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
        self._finite.record(name, var)
        layer = self._moments_layer(name, mean)
        mode = self._small_mode(self.config.moments, layer.num_calls)
        return layer.combine(mean, var, share, mode, self.clock.step, self._kind("moments", layer.num_calls))

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
    ) -> tuple[torch.Tensor, torch.Tensor, HaloRows] | None:
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
        modes = (
            self._small_mode(self.config.moments, norm.num_calls),
            self._small_mode(self.config.halo, conv.num_calls),
        )
        if modes != ("sync", "sync"):
            return None
        self._finite.record(names[0], var)
        kinds = self._kind("moments", norm.num_calls), self._kind("halo", conv.num_calls)
        return norm.combine_with_rows(mean, var, share, conv, x, self.clock.step, kinds)

    def _halo_layer(self, name: str, x: torch.Tensor, above: int, below: int) -> HaloLayer:
        layer = self._halos.get(name)
        if layer is None or layer.key != halo_key(x, above, below):
            self._discard(layer)
            scratch = self._scratch(x.device)
            coded = self.config.codec != "raw"
            layer = HaloLayer(self._rows, self._bucketer, scratch, name, x, above, below, self._gain, coded)
            self._halos[name] = layer
        return layer

    def _moments_layer(self, name: str, mean: torch.Tensor) -> MomentsLayer:
        layer = self._moments.get(name)
        if layer is None or layer.key != moments_key(mean):
            self._discard(layer)
            layer = self._moments[name] = MomentsLayer(self._rows, self._bucketer, name, mean, self._gain)
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
            self._finite.record("the output", part)
        gathered = part.new_empty(self.replica_collectives.group.world_size, *part.shape)
        collected = self.replica_collectives.all_gather(
            part, gathered, self._step_kind(kind), f"the {kind} at step {step}"
        ).wait()
        # The network is done: whoever is in the open parcel comes again at the next step only. On a slow link what is
        # waited for must not queue behind it.
        self._bucketer.send()
        return collected

    def count(self, part: torch.Tensor, kind: str) -> None:
        """Count what xDiT itself hands to a collective of its own."""
        self.collectives.traffic.sent[self._step_kind(kind)] += part.nbytes
        self.collectives.traffic.messages[self._step_kind(kind)] += 1

    def _step_kind(self, kind: str) -> str:
        return f"{kind}-warmup" if self.clock.step < self.config.warmup_steps else kind

    def report(self) -> Report:
        """Counters of the last (or current) generation, for this rank."""
        traffic = self.collectives.traffic
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
                holder.nbytes for holder in (*self._all_layers(), self._bucketer, *self._scratch_buffers.values())
            ),
            window=self.window.found,
        )

    @property
    def scratch_sizes(self) -> dict[str, int]:
        """Bytes of each room that all layers use in turn; part of what `report` calls `buffer_bytes`."""
        sizes = Counter[str]()
        for scratch in self._scratch_buffers.values():
            sizes.update(scratch.sizes)
        return dict(sizes)

    def _look(self, step: int, is_last: bool) -> None:
        """After a step: has another rank given up, and were this one's numbers finite?

        Raises:
            ExchangeTimeout, NotFinite
        """
        detector, group = self.group.detector, self.group
        if detector is not None and detector.is_alarmed:
            raise ExchangeTimeout(f"rank {detector.rank}: given up after step {step}: {detector.diagnose()}")
        self._finite.check(step, group.rank if detector is None else detector.rank, is_last)

    def no_room(self, error: Exception) -> str:
        """What to say when a buffer cannot be made."""
        reason = str(error).partition("\n")[0]
        return (
            f"rank {self.group.rank} of {self.group.world_size}: no room for the exchange's buffers at step "
            f"{self.clock.step}, which take {self.report().buffer_bytes / 1e6:.1f} MB so far ({reason}); give "
            "--otil_kv_cache_dtype float8, a smaller picture or batch, --use_cfg_parallel, or --parallel sync, which "
            "keeps no copies (`otil-xdit memory` tells beforehand)"
        )

    def _all_layers(self) -> list[KVGroup | HaloLayer | MomentsLayer]:
        return [*self.stacks, *self._halos.values(), *self._moments.values()]

    def _kind(self, what: str, num_calls: int) -> str:
        """The counter that a layer's bytes go to: those of warm-up steps are kept apart."""
        return f"{what}-warmup" if min(self.clock.step, num_calls) < self.config.warmup_steps else what

    def _mode(self, num_calls: int) -> Mode:
        """How a layer that was called `num_calls` times before exchanges at this step."""
        step, window = self.clock.step, self.window
        return self._schedule.mode(step, num_calls, self.clock.total, window.holds(step) if window.exists else None)

    def _small_mode(self, freshness: SmallFreshness, num_calls: int) -> Mode:
        mode = self._mode(num_calls)
        return "sync" if mode == "fresh" or (mode == "displaced" and freshness == "fresh") else mode

    @staticmethod
    def _discard(layer: HaloLayer | MomentsLayer | None) -> None:
        """Wait for what a layer has under way before its buffers go."""
        if layer is not None:
            layer.drain()

    def _place(self, name: str, key: torch.Tensor) -> tuple[KVGroup, int]:
        """The stack of the layer `name`, whose keys are [B, H, S, D], and its place there."""
        batch, heads, tokens, size = key.shape
        shape = torch.Size((2, batch, tokens, heads * size))
        stack, layer = self._layers.get(name, (None, 0))
        if stack is not None and stack.shape == shape and stack.dtype == key.dtype:
            if stack.num_calls[layer]:
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

    def _new_stack(self, name: str, shape: torch.Size, dtype: torch.dtype, table: torch.Tensor) -> KVGroup:
        self._picker.discard(name)
        scratch = self._scratch(table.device)
        stack = KVGroup(self.collectives, shape, dtype, table, self.config, self._picker, scratch)
        self.stacks.append(stack)
        return stack

    def _scratch(self, device: torch.device) -> ScratchBuffers:
        if device not in self._scratch_buffers:
            self._scratch_buffers[device] = ScratchBuffers(device)
        return self._scratch_buffers[device]

    def _leave(self, stack: KVGroup) -> None:
        """A layer has another shape now: its stack goes, once nothing of it is under way.

        The stack's other layers join others when they are called next, as they would in a run that has just begun:
        otherwise they would keep its buffers, and its name for picking, beside those of the layer that has left.
        """
        stack.drain()
        self.stacks.remove(stack)
        self._layers = {key: place for key, place in self._layers.items() if place[0] is not stack}
        self._called = None if self._called is stack else self._called

    def _compare(self, stack: KVGroup, layer: int) -> None:
        """Raise `RuntimeError` on every rank where the ranks' copies of a layer are not the same, bit for bit."""
        step, name = self.clock.step, stack.names[layer]
        digest = torch.stack([_digest(tensor) for tensor in stack.shared_state(layer)])
        everybody = digest.new_empty(self.group.world_size, *digest.shape)
        self.collectives.all_gather(digest, everybody, "check", f"the check of layer {name} at step {step}").wait()
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
