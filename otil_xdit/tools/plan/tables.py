"""A plan as tables for people, as data for machines, and as a command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from otil_xdit.dryrun.job import Job, ParallelDegrees
from otil_xdit.tools.common.tables import markdown, number
from otil_xdit.tools.plan.advice import Advice
from otil_xdit.tools.plan.fit import Comparison
from otil_xdit.tools.plan.options import Option, settings_by_label

KINDS = ("kv", "halo", "moments", "output", "ulysses", "stages")

_TITLES = ("strategy", "ranks")

COMMANDS = {"FLUX": "FLUX.1-dev"}
"""What `xfuser --model` calls a published network, where it is another name."""


def bytes_table(options: list[Option]) -> str:
    """Return bytes by kind and number of messages, of a step of each mode of each option."""
    rows = []
    for option in options:
        for name, mode, count in _modes(option):
            step = option.run.steps[mode]
            counted = [f"{step.bytes_of(kind):,}" for kind in KINDS]
            rows.append((option.label, str(option.degrees), name, str(count), *counted, str(len(step.log))))
    return markdown((*_TITLES, "steps", "number", *KINDS, "messages"), rows, text=3)


def _modes(option: Option) -> list[tuple[str, str, int]]:
    """Return the rows of an option: a name, the mode of the steps that are meant, and their number."""
    modes = option.run.modes
    if option.is_exact:
        return [("every", modes[0], len(modes))]
    return [(mode, mode, modes.count(mode)) for mode in option.run.steps]


def memory_table(options: list[Option]) -> str:
    """Return what each option keeps, in MB."""
    rows = [(option.label, str(option.degrees), f"{option.run.buffer_bytes / 1e6:.1f}") for option in options]
    return markdown((*_TITLES, "buffers"), rows, text=2)


def time_table(options: list[Option], steps: int) -> str:
    """Return predicted milliseconds of a step of each mode, by the model's terms, and seconds of all steps."""
    rows = []
    of_card = any(time.moving for option in options for time in option.times.values())
    parts = ("computing", *(("launching", "moving") if of_card else ("handling",)), "waiting", "late", "total")
    for option in sorted(options, key=lambda option: option.seconds or 0.0):
        whole = number(option.seconds, 2)
        for name, mode, _ in _modes(option):
            time = option.times[mode]
            terms = (number(getattr(time, part), 1, 1e3) for part in parts)
            rows.append((option.label, str(option.degrees), name, *terms, whole))
            whole = ""
    titles = ("steps", *parts[:-1], "step, ms", f"{steps} steps, s")
    return markdown((*_TITLES, *titles), rows, text=3)


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Return predicted and measured milliseconds of a step, mean over an image."""
    rows = []
    for one in comparisons:
        seen = one.observation
        figures = (number(one.predicted, 1, 1e3), number(seen.step, 1, 1e3), f"{one.error:+.0%}")
        rows.append((seen.group, seen.option.label, "fitted" if one.fitted else "", *figures))
    return markdown(("runs", "strategy", "", "predicted, ms", "measured, ms", "off by"), rows, text=3)


def command_of(option: Option, job: Job, model: str, steps: int) -> str:
    """Return the `xfuser` command line of an option."""
    parts = ["xfuser", "--model", COMMANDS.get(model, model), *option.flags]
    parts += ["--height", str(job.height), "--width", str(job.width), "--num_inference_steps", str(steps)]
    return " ".join([*parts, "--prompt", '"..."'])


def call_of(option: Option) -> str:
    """Return the call of `otil_xdit.parallelize` of an option, for pipelines that `xfuser` has no command line for."""
    name, given = settings_by_label().get(option.label, ("sync", {}))
    parts = ["pipe", f'"{name}"']
    parts += [f'get_strategy("{name}").make_config({given})'] if given else []
    parts += [f"ulysses_degree={option.degrees.ulysses}"] if option.degrees.ulysses > 1 else []
    parts += ["use_cfg_parallel=True"] if option.degrees.cfg > 1 else []
    parts += [f"patch_shares={option.degrees.shares}"] if option.degrees.shares else []
    return f"otil_xdit.parallelize({', '.join(parts)})"


def as_data(
    job: Job, options: list[Option], refused: dict[ParallelDegrees, str], advice: Advice | None, steps: int
) -> dict[str, Any]:
    """Return all options, for machines; bytes of a step by kind, seconds where they are predicted."""
    return {
        "model": job.network.name,
        "height": job.height,
        "width": job.width,
        "batch": job.batch,
        "dtype": str(job.dtype).removeprefix("torch."),
        "steps": steps,
        "options": [_option_data(option) for option in options],
        "left_out": [{**asdict(degrees), "reason": reason} for degrees, reason in refused.items()],
        "advice": None
        if advice is None
        else {**_option_data(advice.option), "reason": advice.reason, "flags": advice.option.flags},
    }


def _option_data(option: Option) -> dict[str, Any]:
    return {
        "strategy": option.label,
        "degrees": asdict(option.degrees),
        "seconds": option.seconds,
        "buffer_bytes": option.run.buffer_bytes,
        "sent_bytes": option.run.sent_bytes,
        "messages": option.run.messages,
        "steps": {
            mode: {
                "count": option.run.modes.count(mode),
                "bytes": {kind: step.bytes_of(kind) for kind in KINDS},
                "messages": len(step.log),
                "launches": step.launches.count or None,
                "moved_bytes": step.launches.nbytes or None,
                "seconds": {**asdict(option.times[mode]), "total": option.times[mode].total}
                if mode in option.times
                else None,
            }
            for mode, step in option.run.steps.items()
        },
    }
