"""What a user's callbacks may do to a generation whose ranks share the latent, and how the ranks stay alike.

A U-Net's pipeline has the whole latent on every rank. xDiT's wrappers of DiTs cut the latent before the first step, so
their callbacks are given the whole one here, and what they make of it is shared out again. Ranks may have different
callbacks (a progress bar on one of them), but not different latents.

Over 300 lines: what shares the latent out, and what two kinds of callbacks do with it, go together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import Signature, isfunction, unwrap
from types import CodeType
from typing import Any, Protocol, cast

import torch
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from otil_xdit.comm.groups import UnetGroups
from otil_xdit.networks.dit.token_counts import Rows
from otil_xdit.runtime.vae_sharing import VaeSharing

IS_GIVEN = "a callback"
"""The fact of a rank that is given a callback; the others have none, so it is not compared."""

STEP_END, LEGACY = "callback_on_step_end", "callback"

_LATENT_DIMS = 3
"""Of a latent at least; timesteps have fewer."""

_TOLERANCE = {4: 1e-3, 8: 1e-3}
"""By which the ranks' digests may differ, by bytes of a number; devices of different make differ in last bits."""

_LOOSE_TOLERANCE = 1e-2
"""The same of half precision."""

_SCALE = ("guidance_scale", "guidance_rescale")


class CallRules(Protocol):
    """What is known of the calls of a wrapper that xDiT puts round a pipeline."""

    @property
    def latent_dim(self) -> int | None:
        """Return the dimension along which it cuts the latent before the first step; None where it does not."""

    @property
    def shows_latent(self) -> bool:
        """Return whether it can give a callback the latent."""

    @property
    def decodes_last(self) -> bool:
        """Return whether the last rank alone decodes the latent."""

    def check(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        """Raise `ValueError` for arguments, by name, that the wrapper does not treat as diffusers does."""


class WholeLatent:
    """The latent of a pipeline that has this rank's part of it: puts it together, and shares it out.

    Args:
        collect: gives a tensor of every rank of the image, [N, ...].
        members: places there of the ranks that hold the parts, in the parts' order.
        rank: this rank's place among `members`.
        dim: the dimension along which the latent is cut.
        is_shown: whether the pipeline can give a callback the latent.
        rows: tells how many rows the whole has, where the ranks' parts are filled up.

    Attributes:
        stepped: this rank's part as the scheduler has stepped it last.
    """

    def __init__(
        self,
        collect: Callable[[torch.Tensor, str], torch.Tensor],
        members: Sequence[int],
        rank: int,
        dim: int,
        is_shown: bool = True,
        rows: Callable[[], Rows | None] = lambda: None,
    ) -> None:
        self._collect, self._members, self._rank, self._dim = collect, members, rank, dim
        self.is_shown, self._rows = is_shown, rows
        self.stepped: torch.Tensor | None = None

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """Return the whole of which every rank has a part."""
        parts = self._collect(part.contiguous(), "latent")
        whole, rows = torch.cat([parts[member] for member in self._members], self._dim), self._rows()
        return whole if rows is None else whole.narrow(self._dim, 0, rows.real)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's part."""
        rows = self._rows()
        if rows is not None:  # of images and videos, [..., rows, cols]
            whole = functional.pad(whole, (0, 0, 0, rows.filled - rows.real))
        return whole.chunk(len(self._members), self._dim)[self._rank].contiguous()

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call what takes and returns latents with whole ones, and return this rank's part."""
        whole_args, whole_kwargs = tree_map(self._join_latent, (args, dict(kwargs)))
        return tree_map(self._cut_latent, function(*whole_args, **whole_kwargs))

    def see(self, stepped: Any) -> None:
        """Record what a scheduler's `step` has returned."""
        self.stepped = next((value for value in tree_leaves(stepped) if _is_latent(value)), None)

    def _join_latent(self, value: Any) -> Any:
        return self.join(value) if _is_latent(value) else value

    def _cut_latent(self, value: Any) -> Any:
        return self.cut(value) if _is_latent(value) else value


def whole_latent(
    rules: CallRules | None,
    groups: UnetGroups | None,
    collect: Callable[[torch.Tensor, str], torch.Tensor],
    rows: Callable[[], Rows | None],
) -> WholeLatent | None:
    """Return what puts the latent of a pipeline together; None for a pipeline whose ranks have all of it.

    Args:
        rules: of a wrapper's calls; None for other pipelines.
        groups: who shares its networks.
        collect, rows: see `WholeLatent`.
    """
    if rules is None or rules.latent_dim is None or groups is None:
        return None
    place_of = {place: at for at, (cfg_rank, place) in enumerate(groups.places) if cfg_rank == groups.cfg_rank}
    members = [place_of[place] for place in sorted(place_of)]
    return WholeLatent(collect, members, groups.rows.rank, rules.latent_dim, rules.shows_latent, rows)


class StepCallbacks:
    """The callbacks of one call of a pipeline.

    Args:
        collect: see `WholeLatent`.
        whole: of a pipeline that has this rank's part of the latent only; None for one that has all of it.
        alone: brackets a callback, which may do on one rank what the others do not, such as decode a preview.
    """

    def __init__(
        self,
        collect: Callable[[torch.Tensor, str], torch.Tensor],
        whole: WholeLatent | None,
        alone: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._collect, self._whole, self._alone = collect, whole, alone
        self._changes, self._changed_steps = 0, 0
        self._digest: torch.Tensor | None = None
        self._tolerance = min(_TOLERANCE.values())

    def put_into(
        self, call: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a pipeline's call, with callbacks that keep the ranks alike.

        Every rank of a pipeline with a `WholeLatent` gets one, as all take part in putting the latent together.
        """
        positional = list(call.parameters)[: len(args)]
        given = {**dict(zip(positional, args, strict=False)), **kwargs}
        for name, wrap in ((STEP_END, self._on_step_end), (LEGACY, self._legacy)):
            if given.get(name) is not None or (self._whole is not None and name in call.parameters):
                wrap(given)
        return tuple(given.pop(name) for name in positional) + args[len(positional) :], given

    def check_alike(self, device: torch.device) -> None:
        """Compare what the ranks' callbacks made of the latents.

        Raises:
            ValueError: on every rank, where they differ.
        """
        digest = torch.zeros(4, device=device) if self._digest is None else self._digest.to(device)
        counts = torch.tensor([self._changes, self._changed_steps], dtype=digest.dtype, device=device)
        by_rank = self._collect(torch.cat([counts, digest]), "callback").cpu()
        counts, digests = by_rank[:, :2], by_rank[:, 2:]
        if not (counts == counts[0]).all():
            told = ", ".join(f"{count:g} on rank {rank}" for rank, count in enumerate(counts[:, 0].tolist()))
            self._refuse(f"changed the latents at other steps of one rank than of another ({told})")
        if ((digests - digests[0]).abs().amax() > self._tolerance * digests[:, 0].amax()).item():
            self._refuse("made other latents on one rank than on another")

    def _refuse(self, what: str) -> None:
        raise ValueError(f"the ranks do not agree: the callback {what}; give every rank a callback that does the same")

    # ---- the two kinds of callbacks --------------------------------------------------------------------------------

    def _on_step_end(self, given: dict[str, Any]) -> None:
        """Put a callback in the place of ``callback_on_step_end``, which returns what it changes."""
        callback, wanted = given.get(STEP_END), given.get(f"{STEP_END}_tensor_inputs", ["latents"])
        wanted = getattr(callback, "tensor_inputs", wanted)  # as diffusers reads its own callbacks

        def whole_callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
            assert self._whole is not None
            part = cast(torch.Tensor, tensors.get("latents", self._whole.stepped))
            return self._call_whole(callback, "latents" in wanted, pipe, step, timestep, part)

        def watched(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
            before = tensors.get("latents")
            version = _version(before)
            with self._alone():
                made = cast(Any, callback)(pipe, step, timestep, tensors)
            after = made.get("latents", before) if isinstance(made, Mapping) else before
            self._record(step, before, version, after)
            return made

        given[STEP_END] = watched if self._whole is None else whole_callback
        shown = ["latents"] if self._whole is not None and self._whole.is_shown else []
        given[f"{STEP_END}_tensor_inputs"] = wanted if self._whole is None else shown

    def _call_whole(
        self, callback: Any, wants_latents: bool, pipe: Any, step: int, timestep: Any, part: torch.Tensor
    ) -> Any:
        """Call a callback with the whole latent, and return what it returns for this rank's part."""
        assert self._whole is not None, "put_into has asked"
        whole = self._whole.join(part)
        if callback is None:
            return {}
        version, scales = _version(whole), _scales(pipe)
        with self._alone():
            made = callback(pipe, step, timestep, {"latents": whole} if wants_latents else {})
        if _scales(pipe) != scales:
            raise ValueError(
                "--parallel does not support a callback that changes guidance_scale: xDiT's wrapper of this pipeline "
                "would not follow; leave it as it is, or run on one rank"
            )
        if not isinstance(made, Mapping):
            return made  # the pipeline will say what it wants
        others = [name for name in made if name != "latents"]
        if others:
            raise ValueError(
                f"--parallel does not support a callback that returns {', '.join(others)}: xDiT's wrapper of this "
                "pipeline does not take it as diffusers does; return latents only, or run on one rank"
            )
        after = made.get("latents", whole)
        return {"latents": self._whole.cut(after)} if self._record(step, whole, version, after) else {}

    def _legacy(self, given: dict[str, Any]) -> None:
        """Put a callback in the place of ``callback``, which changes latents in place, every ``callback_steps``."""
        callback, steps = given.get(LEGACY), given.get("callback_steps", 1)
        if not isinstance(steps, int) or steps < 1:
            return  # the pipeline will say so
        calls = iter(range(2**62))

        def whole_callback(step: int, timestep: Any, part: torch.Tensor) -> None:
            assert self._whole is not None
            whole = self._whole.join(part)
            if callback is not None and next(calls) % steps == 0:
                version = _version(whole)
                with self._alone():
                    callback(step, timestep, whole)
                if self._record(step, whole, version, whole):
                    part.copy_(self._whole.cut(whole))

        def watched(step: int, timestep: Any, latents: torch.Tensor) -> None:
            version = _version(latents)
            with self._alone():
                cast(Any, callback)(step, timestep, latents)
            self._record(step, latents, version, latents)

        given[LEGACY] = watched if self._whole is None else whole_callback
        if self._whole is not None:
            given["callback_steps"] = 1

    # ---- what they change ------------------------------------------------------------------------------------------

    def _record(self, step: int, before: Any, version: int | None, after: Any) -> bool:
        """Return whether latents were changed, and add them to the digest if they were.

        The digest is a norm and three projections, summed over the steps: nothing waits for the device.
        """
        if after is before and version is not None and _version(after) == version:
            return False
        if not isinstance(after, torch.Tensor):
            return False
        self._changes, self._changed_steps = self._changes + 1, self._changed_steps + step + 1
        self._tolerance = _TOLERANCE.get(after.element_size(), _LOOSE_TOLERANCE)
        values = after.detach().reshape(-1).float()
        places = torch.arange(values.numel(), device=values.device, dtype=torch.float32)
        waves = [(values * torch.cos(rate * places)).sum() for rate in (0.37, 1.1, 2.3)]
        digest = torch.stack([values.norm(), *waves]) * (1 + step % 7)
        self._digest = digest if self._digest is None else self._digest + digest
        return True


def check_loop_shows(kind: type, arguments: Mapping[str, Any]) -> None:
    """Refuse a callback that wants tensors of a loop which looks for them where they are not.

    Some of xDiT's own loops ask for ``locals()`` inside a comprehension, which before Python 3.12 has its own.

    Args:
        kind: the pipeline's class.
        arguments: of the call.

    Raises:
        ValueError: naming what to give.
    """
    callback = arguments.get(STEP_END)
    wanted = getattr(callback, "tensor_inputs", arguments.get(f"{STEP_END}_tensor_inputs"))
    if callback is None or not wanted:
        return
    owners = [owner for owner in kind.__mro__ if owner.__module__.startswith("xfuser.")]
    methods = [unwrap(method) for owner in owners for method in vars(owner).values() if isfunction(method)]
    inner = [part for method in methods for part in method.__code__.co_consts if isinstance(part, CodeType)]
    if any("locals" in part.co_names for part in inner):
        raise ValueError(
            f"{STEP_END} wants {', '.join(wanted)}, which xDiT's loop of this pipeline cannot find before Python 3.12; "
            f"give {STEP_END}_tensor_inputs=[], or leave use_cfg_parallel out"
        )


def callbacks_of(
    by_rank: Mapping[int, Mapping[str, str]],
    collect: Callable[[torch.Tensor, str], torch.Tensor],
    whole: WholeLatent | None,
    vae: VaeSharing | None,
) -> StepCallbacks | None:
    """Return what a call's callbacks are put into; None where no rank is given one, and for a single rank.

    Args:
        by_rank: the ranks' facts.
        collect, whole: see `StepCallbacks`.
        vae: which a callback may use on one rank alone.
    """
    alone = nullcontext if vae is None else vae.alone
    is_given = any(IS_GIVEN in facts for facts in by_rank.values())
    return StepCallbacks(collect, whole, alone) if is_given and len(by_rank) > 1 else None


def _scales(pipe: Any) -> list[Any]:
    """Return the guidance of a pipeline, where it says."""
    return [getattr(pipe, f"_{name}", None) for name in _SCALE]


def _is_latent(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= _LATENT_DIMS


def _version(tensor: Any) -> int | None:
    """Return how often a tensor has been written to; None where torch does not count."""
    return None if not isinstance(tensor, torch.Tensor) or tensor.is_inference() else tensor._version
