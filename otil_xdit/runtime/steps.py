"""What a step is: a pipeline's scheduler ticks the clock, and tells what it is about to step.

During a generation the scheduler has a subclass of its class; by class and attribute rather than by a wrapped bound
method, as some pipelines deep-copy their scheduler, and the copy's steps must neither count nor reach the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, wraps
from inspect import Signature, signature
from typing import Any

import torch

from otil_xdit.catalog.schedulers import draws_noise, steps_by_the_value
from otil_xdit.method.schedule import Clock
from otil_xdit.networks.class_swap import restore_class, subclass_of, swap_class
from otil_xdit.runtime.callbacks import WholeLatent


@dataclass(frozen=True)
class _Listener:
    clock: Clock
    before_step: Callable[[Any], None]
    planned: Callable[[], int | None]
    whole: WholeLatent | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Listener:
        return _Listener(Clock(), _ignore_sample, _plan_nothing)


def _ignore_sample(sample: Any) -> None: ...


def _plan_nothing() -> None: ...


def check_scheduler_step(scheduler: Any) -> None:
    """Check that a scheduler's steps can be counted.

    Raises:
        ValueError: for one whose `step` has been replaced.
    """
    if scheduler is not None and "step" in vars(scheduler):
        raise ValueError(
            f"--parallel does not support a {type(scheduler).__name__} whose step has been replaced: nobody would "
            "count the steps; undo that, or subclass the scheduler"
        )


@contextmanager
def track_steps(
    scheduler: Any,
    clock: Clock,
    before_step: Callable[[Any], None] = _ignore_sample,
    planned: Callable[[], int | None] = _plan_nothing,
    whole: WholeLatent | None = None,
) -> Iterator[None]:
    """Let every `scheduler.step` tick `clock`.

    Args:
        scheduler: a pipeline's, or None.
        clock: learns in the first step how many there are, and whether they draw noise.
        before_step: called before a step with the latent that is stepped.
        planned: how many steps the pipeline says that it will do; None where it does not.
        whole: of a pipeline that steps this rank's part of the latent; a scheduler that draws noise, or looks at all of
            the latent, is given the whole.
    """
    if scheduler is None:
        yield
        return
    swap_class(scheduler, _ticked)
    vars(scheduler)["_otil_listener"] = _Listener(clock, before_step, planned, whole)
    try:
        yield
    finally:
        restore_class(scheduler)
        del vars(scheduler)["_otil_listener"]


def arguments_of(call: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name; none where they do not fit: the call will say so."""
    try:
        bound = call.bind(*args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return {**bound.arguments, **bound.arguments.get("kwargs", {})}


def planned_steps(pipe: Any) -> int | None:
    """Return how many steps a pipeline whose call is under way says it will do; None where it does not say."""
    planned = vars(pipe).get("_num_timesteps")
    return planned if isinstance(planned, int) else None


@cache
def _ticked(kind: Any) -> type:
    call = signature(kind.step)

    @wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        listener: _Listener = self._otil_listener
        arguments = arguments_of(call, (self, *args), kwargs)
        listener.before_step(arguments.get("sample"))
        if listener.whole is None or steps_by_the_value(self, arguments):
            out = kind.step(self, *args, **kwargs)
        else:
            # xDiT's own copies of `step` know fewer settings than those of diffusers.
            inner = vars(self).get("module")
            out = listener.whole.call(partial(kind.step, self) if inner is None else inner.step, args, kwargs)
        if listener.whole is not None:
            listener.whole.see(out)
        if listener.clock.step == 0:
            first = kwargs.get("timestep", args[1] if len(args) > 1 else None)
            listener.clock.total = _steps_of(self, first, listener.planned())
            listener.clock.draws_noise = draws_noise(self, arguments)
        listener.clock.tick()
        return out

    return subclass_of(kind, {"step": step})


def _steps_of(scheduler: Any, first: Any, planned: int | None) -> int | None:
    """Return the number of `step` calls of a generation; None if it is not known.

    Image-to-image begins in the middle of the scheduler's timesteps; where a scheduler of second order has one twice,
    with the second, as diffusers does. A pipeline that ends early (SDXL's `denoising_end`) does fewer, and says how
    many before it begins. Reads the timesteps from the device, once a generation.

    Args:
        first: the timestep of the first call.
        planned: see `track_steps`.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, torch.Tensor) or first is None:
        return None
    known = timesteps.flatten().tolist()
    at = float(torch.as_tensor(first).flatten()[0])
    places = [place for place, timestep in enumerate(known) if timestep == at]
    to_the_end = len(known) - [0, *places[:2]][-1]
    return to_the_end if planned is None else min(planned, to_the_end)
