"""`OtilCommunicator`: everything that a generation needs to remember about the exchange between patches.

One object owns it all (buffers, step counter, selection, counters). It is handed to whoever needs it; no module of
this package keeps state of its own.

Over 300 lines, most of them the documentation of what layers may ask for.

Shapes: N patches, B batch, H heads, S tokens of one patch, D features of a head, C channels, W columns, G groups, R
ranks that hold rows.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch

from otil_xdit.comm.collectives import CollectiveLabel, Collectives
from otil_xdit.comm.finite_check import FiniteCheck
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.errors import ExchangeTimeout
from otil_xdit.exchange.halo import HaloRows
from otil_xdit.exchange.kv_coordinates import LayerCoordinates
from otil_xdit.exchange.kv_groups import KVGroups, check_copies
from otil_xdit.exchange.modes import StepModes
from otil_xdit.exchange.pass_agreement import PassAgreement
from otil_xdit.exchange.report import Report
from otil_xdit.exchange.small_layers import SmallLayers
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.coordinates import AttentionWeights
from otil_xdit.method.grid import TokenLayout
from otil_xdit.method.inference import keeps_tensors
from otil_xdit.method.schedule import Clock
from otil_xdit.method.scratch import ScratchBuffers
from otil_xdit.method.selection import BlockSelector
from otil_xdit.method.window import Window

OutOfMemory: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)  # 2.4 has the latter

P = ParamSpec("P")
T = TypeVar("T")


def _timed(call: Callable[Concatenate[OtilCommunicator, P], T]) -> Callable[Concatenate[OtilCommunicator, P], T]:
    """Wrap a method of `OtilCommunicator`: add its time up, and say what to do where buffers find no memory.

    Buffers are made in it, so it leaves `torch.inference_mode`.
    """

    @wraps(call)
    @keeps_tensors
    def timed(run: OtilCommunicator, *args: P.args, **kwargs: P.kwargs) -> T:
        started = time.perf_counter()
        device_times = run.collectives.traffic.device_times
        began = device_times.mark() if device_times.is_timing else None
        try:
            return call(run, *args, **kwargs)
        except RuntimeError as error:  # OutOfMemory is one
            if not _is_out_of_memory(error):
                raise
            raise OutOfMemory(run.out_of_memory(error)) from error
        finally:
            run._spent += time.perf_counter() - started
            if began is not None:
                device_times.add("exchange", began)

    return timed


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, OutOfMemory) or "can't allocate memory" in str(error)


class OtilCommunicator:
    """The exchange of one pipeline's patches, over any number of generations.

    Over 200 lines, for the reason at the top of this file.

    Args:
        config: the settings.
        group: the ranks that hold the patches.
        make_collectives: makes what carries the messages of a group of ranks; arguments as those of `Collectives`.
    """

    def __init__(
        self, config: OtilConfig, group: PatchGroup, make_collectives: Callable[..., Collectives] = Collectives
    ) -> None:
        self.config, self.group = config, group
        self.collectives = make_collectives(group, config.timeout)
        self.replica_collectives = make_collectives(group.replica or group, config.timeout, self.collectives.traffic)
        rows = make_collectives(group.rows or group, config.timeout, self.collectives.traffic)
        agreement = None
        if group.passes is not None and group.passes.world_size > 1 and PassAgreement.serves(config):
            agreement = PassAgreement(make_collectives(group.passes, config.timeout, self.collectives.traffic))
        self._spent = 0.0
        self.clock = Clock()
        self.clock.after_step.append(self._after_step)
        self.window = Window(config.window_settings)
        self._finite = FiniteCheck()
        self._modes = StepModes(config, self.clock, self.window)
        self._scratch_buffers: dict[torch.device, ScratchBuffers] = {}
        self.selector = BlockSelector(config, self.clock, group.rank, group.ulysses_degree)
        self._coordinates = LayerCoordinates(group) if config.uses_coordinates else None
        self.kv = KVGroups(self.collectives, config, self.selector, self._scratch, self._coordinates, agreement)
        self._small = SmallLayers(rows, config, self._modes, self.clock, self._scratch)

    @keeps_tensors
    def begin(self) -> None:
        """Start a generation: nothing of the last one may show in it."""
        self.end()
        self.clock.reset()
        self._finite.begin()
        self.window.begin()
        self._spent = 0.0
        self.collectives.traffic.clear()
        self.selector.begin()
        self.kv.begin()
        self._small.begin()

    @keeps_tensors
    def end(self) -> None:
        """Finish what is still under way; also after an exception, before buffers are used again."""
        self._small.drop_bucket()
        for group in self.kv.groups:
            group.discard_pending()
        self._small.apply_pending()

    def free(self) -> None:
        """Give the buffers back."""
        if self.collectives.group.detector is None or not self.collectives.group.detector.why_broken:
            self.end()
        self.kv.clear()
        self._small.clear()
        self.selector.clear()
        self._scratch_buffers.clear()

    @keeps_tensors
    def set_weights(self, layers: Mapping[str, AttentionWeights]) -> str:
        """Take the weights of attention layers for what their keys and values are coded in, before a generation.

        Args:
            layers: of all layers whose weights are known, by ``network/module``, the parts of the names of `gather`
                that say which module calls.

        Returns:
            A digest of what follows from them, which must be equal on all ranks; empty where they are not needed.
        """
        if self._coordinates is None:
            return ""
        before, digest = self._coordinates.digest, self._coordinates.update(layers)
        if digest != before:
            self.kv.clear()
        return digest

    @keeps_tensors
    def observe(self, latent: torch.Tensor | None, layout: TokenLayout) -> None:
        """Take note of what the network is called with.

        Args:
            latent: this rank's rows of the latent, [B, C, rows, cols], or None where they are not known. The second
                call within a step (a separate pass without the prompt) changes nothing.
            layout: what this rank's attention sequences are made of, until the next call.

        Raises:
            ValueError: where the score that selects sub-blocks means nothing for such small ones. A session shows every
                kind of layer before a generation begins, so that no rank finds out after it has sent something.
        """
        self.selector.observe(latent, layout)

    @_timed
    def gather(self, name: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return everybody's keys and values for one attention call.

        Args:
            name: tells the layer from every other one; equal on all ranks and from step to step.
            key, value: this rank's, [B, H, S, D].

        Returns:
            Two [B, H, N * S, D], valid until the next call of any layer; this rank's part is fresh.
        """
        group, layer = self.kv.call(name, key)
        num_calls, step = group.num_calls[layer], self.clock.step
        mode = self._modes.of_kv(num_calls)
        if mode == "displaced" and self.config.tolerance > 0:
            group.apply_pending()
            mode = "fresh" if group.error(layer) > self.config.tolerance else mode
        if self.config.check and mode != "sync":
            group.apply_pending()
            check_copies(self.collectives, group, layer, step)
        phase = self._modes.phase(num_calls)
        self.kv.agree_on_gains(mode, CollectiveLabel("kv", "", step, phase))
        whole = group.gather(layer, key, value, mode, step, phase)
        self._finite.record(name, group.numbers(layer))
        heads = whole.unflatten(3, (key.shape[1], -1)).transpose(2, 3)
        return heads[0], heads[1]

    @_timed
    def halo(
        self, name: str, x: torch.Tensor, above: int, below: int, precomputed: HaloRows | None = None
    ) -> torch.Tensor:
        """Return a map between the rows that its neighbours have above and below it, and zeros beyond the image.

        Args:
            name: as in `gather`.
            x: this rank's map, [B, C, rows, W].
            above, below: number of rows of the rank before and of the one after.
            precomputed: the rows where they are known already, on every rank alike (see `norm_halo`); no message is
                sent for them.

        Returns:
            [B, C, above + rows + below, W], valid until the next call of any layer.
        """
        return self._small.halo(name, x, above, below, precomputed)

    @keeps_tensors
    def room_for(self, name: str, x: torch.Tensor, above: int, below: int) -> torch.Tensor:
        """Return room to write the input of a convolution to, so that `halo` need not copy it.

        Args:
            name: of the convolution, as in `gather`.
            x: a map like it, [B, C, rows, W].
            above, below: as in `halo`.

        Returns:
            [B, C, rows, W], in the memory format of `x`; valid until the next call of this method.
        """
        return self._small.room_for(x, above, below)

    @_timed
    def moments(
        self, name: str, mean: torch.Tensor, var: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the whole maps' mean and biased variance from this rank's, as far as the settings let it know them.

        Args:
            name: as in `gather`.
            mean, var: float32 [B, G].
            share: [R], every rank's share of the rows.
        """
        self._finite.record(name, var)
        return self._small.moments(name, mean, var, share)

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
        """Return `moments`, and the rows of `x` above and below this rank's, for one wait.

        Args:
            names: of the group norm that asks for the moments, and of the convolution that is to read those rows (once
                the norm has made something of them) by `halo`.
            mean, var, share: as in `moments`.
            x: the norm's input, [B, C, rows, W].
            above, below: number of rows.

        Returns:
            None where the settings have one or both a step late; `moments` and `halo` are then asked apart.
        """
        found = self._small.norm_halo(names, mean, var, share, x, above, below)
        if found is not None:  # otherwise `moments` records it
            self._finite.record(names[0], var)
        return found

    @_timed
    def collect(self, part: torch.Tensor, kind: str = "output") -> torch.Tensor:
        """Return a tensor of the same shape from every rank that works on the image: [N, *part.shape].

        Args:
            part: this rank's, contiguous.
            kind: the counter that the bytes go to, and its name in error messages.
        """
        if kind == "output":
            self._finite.record("the output", part)
        gathered = part.new_empty(self.replica_collectives.group.world_size, *part.shape)
        label = CollectiveLabel(kind, f"the {kind}", self.clock.step, self._modes.phase())
        collected = self.replica_collectives.all_gather(part, gathered, label).wait()
        # The network is done: whoever is in the open bucket comes again at the next step only. On a slow link what is
        # waited for must not queue behind it.
        self._small.send_bucket()
        return collected

    def count(self, part: torch.Tensor, kind: str) -> None:
        """Count what xDiT itself hands to a collective of its own."""
        counter = CollectiveLabel(kind, "", self.clock.step, self._modes.phase()).counter
        self.collectives.traffic.count({counter: part.nbytes})

    def report(self) -> Report:
        """Return the counters of the last (or current) generation, for this rank."""
        kept = self.kv.nbytes + self._small.nbytes
        scratch = sum(buffers.nbytes for buffers in self._scratch_buffers.values())
        return Report.of(
            self.collectives.traffic,
            self.clock.step,
            self.config.warmup_steps,
            self._spent,
            kept + scratch,
            self.window.found,
        )

    @property
    def scratch_sizes(self) -> dict[str, int]:
        """Bytes of each scratch buffer, which all layers use in turn; part of what `report` calls `buffer_bytes`."""
        sizes = Counter[str]()
        for scratch in self._scratch_buffers.values():
            sizes.update(scratch.sizes)
        return dict(sizes)

    def out_of_memory(self, error: Exception) -> str:
        """Say what to do when a buffer cannot be made."""
        reason = str(error).partition("\n")[0]
        return (
            f"rank {self.group.rank} of {self.group.world_size}: no room for the exchange's buffers at step "
            f"{self.clock.step}, which take {self.report().buffer_bytes / 1e6:.1f} MB so far ({reason}); give "
            "--otil_kv_cache_dtype float8 (in float32), a smaller image or batch, --use_cfg_parallel, or --parallel "
            "sync, which keeps no copies (`otil-xdit memory` tells beforehand)"
        )

    def _after_step(self, step: int, is_last: bool) -> None:
        """Look whether another rank has given up, and whether this one's numbers were finite.

        Raises:
            ExchangeTimeout, NotFinite
        """
        detector, group = self.group.detector, self.group
        if detector is not None and detector.is_alarmed:
            raise ExchangeTimeout(f"rank {detector.rank}: given up after step {step}: {detector.diagnose()}")
        if not (is_last or self.collectives.host_waits):
            self.collectives.traffic.device_times.after_step(step)
        self._finite.check(step, group.rank if detector is None else detector.rank, is_last)

    def _scratch(self, device: torch.device) -> ScratchBuffers:
        if device not in self._scratch_buffers:
            self._scratch_buffers[device] = ScratchBuffers(device)
        return self._scratch_buffers[device]
