"""Part "speed": milliseconds of a step by strategy, taking turns, with launches and gaps."""

from __future__ import annotations

import gc
import time
from contextlib import ExitStack, nullcontext
from itertools import chain, repeat
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist

from otil_xdit.catalog.bundled import BUNDLED, model_folder
from otil_xdit.catalog.folders import OWN, device, load_pipe
from otil_xdit.runtime.strategies import get_strategy
from otil_xdit.tools.bench.tasks import Stopwatch
from otil_xdit.tools.check.kernels import eager, why_absent
from otil_xdit.tools.check.profile import StepProfiler
from otil_xdit.tools.check.random_pipes import SIZE, Subject, memory_needed, random_subject
from otil_xdit.tools.check.rank import GUIDANCE, PROMPT, parallel
from otil_xdit.tools.check.rank import SIZE as SMALL_SIZE
from otil_xdit.tools.check.runner import Check, Finding, Skipped
from otil_xdit.tools.common.tables import markdown, number

ALONE, EAGER = "one process", "otil without kernels"
"""What is compared besides strategies."""

STRATEGIES = (ALONE, "sync", "distrifusion", "otil")

WARMUP_STEPS = get_strategy("otil").make_config({}).warmup_steps

SHARE = 0.6
"""Of a model's time, for rounds that are timed; loading and the first round take the rest."""


def run(check: Check) -> Finding:
    """Time every model under every strategy."""
    settings = check.settings
    strategies = (*STRATEGIES, *((EAGER,) if why_absent(settings.cards) is None else ()))
    seconds = SHARE * check.seconds / len(settings.models)
    asked = {"strategies": strategies, "steps": settings.steps, "rounds": settings.rounds, "seconds": seconds}
    models = [_summary(model, check.ask(measure, model=model, **asked)) for model in settings.models]
    timed = [model for model in models if "skipped" not in model]
    if not timed:
        raise Skipped("; ".join(f"{model['model']}: {model['skipped']}" for model in models))
    about = "Milliseconds of a step after the warm-up, on the slowest rank, median of the rounds."
    if settings.shares_card:
        about += " All ranks share one card: this is what the exchange costs, not what several cards gain."
    said = "; ".join(
        f"{model['model']} " + ", ".join(f"{name} {one['ms']:.1f}" for name, one in model["strategies"].items())
        for model in timed
    )
    return Finding(f"ms a step: {said}", {"models": models}, f"{about}\n\n{_table(models, settings.cards)}")


def _summary(model: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a model's figures by strategy; only rank 0 has launches and gaps."""
    first = answers[0]
    if "skipped" in first:
        return {"model": model, "skipped": first["skipped"]}
    found = {}
    for name, counts in first["counts"].items():
        by_rank = [one["rounds"][name] for one in answers if one["rounds"][name]]
        found[name] = {"ms": 1e3 * median(map(max, zip(*by_rank, strict=True))), "rounds": len(by_rank[0]), **counts}
    return {"model": model, "size": first["size"], "dtype": first["dtype"], "strategies": found}


def _table(models: list[dict[str, Any]], cards: int) -> str:
    counted = "launches" if cards else "operators"
    titles = ("model", "strategy", "ms a step", "times as fast", counted, "device idle, ms")
    rows = []
    for model in models:
        if "skipped" in model:
            rows.append((model["model"], model["skipped"], "", "", "", ""))
            continue
        alone = model["strategies"][ALONE]["ms"]
        for name, one in model["strategies"].items():
            label = f"{model['model']}, {model['size']} pixels, {model['dtype']}"
            figures = (f"{one['ms']:.1f}", f"{alone / one['ms']:.2f}", f"{one['launches']:.0f}")
            rows.append((label, name, *figures, number(one["idle_ms"], 1)))
    return markdown(titles, rows)


def measure(model: str, strategies: tuple[str, ...], steps: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Draw images under all strategies in turns.

    Args:
        model: shipped, or published and then with random weights.
        strategies: in the order of a round.
        steps: of an image.
        rounds: at most; fewer where time does not suffice, one at least.
        seconds: for the rounds.

    Returns:
        ``rounds``: this rank's seconds of a step, by strategy; on rank 0 ``counts`` of a step as well; or ``skipped``.
    """
    reason = _agreed(_why_not(model))
    if reason is not None:
        return {"skipped": reason}
    subject, size = _subject(model)
    counts = {name: _draw(subject, name, steps, is_profiled=True)["counts"] for name in strategies}
    started = time.perf_counter()
    timed = {name: _draw(subject, name, steps, is_profiled=False)["seconds"] for name in strategies}
    more = _agreed(min(rounds, int(seconds / (time.perf_counter() - started)))) - 1
    for name in chain.from_iterable(repeat(strategies, more)):
        timed[name] += _draw(subject, name, steps, is_profiled=False)["seconds"]
    dtype = str(subject.pipe.dtype).removeprefix("torch.")
    return {"rounds": timed, "counts": counts, "size": size, "dtype": dtype}


def _draw(subject: Subject, name: str, steps: int, is_profiled: bool) -> dict[str, Any]:
    """Draw one image; return the mean seconds of a step after the warm-up, and what the last one launches."""
    rank, watch = dist.get_rank(), Stopwatch(torch.cuda.is_available())
    profiler = StepProfiler(steps) if is_profiled and rank == 0 else None

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if profiler is not None:
            profiler.on_step_end(step)
        return watch.step(pipe, step, timestep, tensors)

    with ExitStack() as stack:
        stack.enter_context(eager() if name == EAGER else nullcontext())
        strategy = "otil" if name == EAGER else name
        pipe = subject.pipe if name == ALONE else stack.enter_context(parallel(subject.pipe, strategy))
        dist.barrier()
        if name == ALONE and rank > 0:
            dist.barrier()
            return {"seconds": [], "counts": None}
        pipe(
            **subject.call,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=on_step_end,
            callback_on_step_end_tensor_inputs=[],
        )
        dist.barrier()
    # The watch begins with the end of the first step.
    taken = mean(watch.seconds()[WARMUP_STEPS:])
    return {"seconds": [taken], "counts": None if profiler is None else profiler.counts()}


def _subject(model: str) -> tuple[Subject, int]:
    """Return a model's pipeline and its pixels a side."""
    if model not in BUNDLED:
        subject = random_subject(model, _dtype(), device())
        subject.pipe.set_progress_bar_config(disable=True)
        return subject, SIZE
    pipe = load_pipe(model_folder(model), OWN, None)
    size = {"height": SMALL_SIZE, "width": SMALL_SIZE}
    return Subject(pipe, {"prompt": PROMPT, "guidance_scale": GUIDANCE, "output_type": "latent", **size}), SMALL_SIZE


def _dtype() -> torch.dtype:
    """Return what networks of published size compute in here."""
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _why_not(model: str) -> str | None:
    """Return why a model does not fit this rank's share of its device; None where it does."""
    if model in BUNDLED:
        return None
    if not torch.cuda.is_available():
        return "networks of published size are timed on cards only"
    needed = memory_needed(model, _dtype())
    gc.collect()  # the model before
    torch.cuda.empty_cache()
    cards = torch.cuda.device_count()
    ranks = max(1, dist.get_world_size() // cards)
    free = torch.cuda.mem_get_info()[0] / ranks
    return None if free > needed else f"{free / 1e9:.0f} GB are free for a rank, it wants {needed / 1e9:.0f}"


def _agreed(value: Any) -> Any:
    """Return the value of the first rank that has one; all ranks call this."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return next((one for one in values if one is not None), None)
