"""Part "advice": the flags to use, from what the other parts measured."""

from __future__ import annotations

from typing import Any

import torch

from otil_xdit.dryrun.job import Job
from otil_xdit.dryrun.networks import find_network
from otil_xdit.tools.check.runner import Check, Finding, Skipped
from otil_xdit.tools.check.speed import ALONE, STRATEGIES
from otil_xdit.tools.common.links import Link
from otil_xdit.tools.plan.advice import advise, bar_of
from otil_xdit.tools.plan.latency import Machine
from otil_xdit.tools.plan.options import degrees_of, options_of
from otil_xdit.tools.plan.tables import command_of

TIE = 1.02
"""Times that differ by less are taken for equal: then the exact strategy."""

NEAR = "distrifusion"
"""Whose images are good enough; see `otil-xdit plan --near`."""

PLANNED_STEPS = 30


def run(check: Check) -> Finding:
    """Recommend flags for every model that was timed."""
    found, settings = check.found, check.settings
    models = [model for model in found.get("speed", {}).get("models", []) if "skipped" not in model]
    if not models:
        raise Skipped("no model was timed; run it together with --parts speed links")
    if settings.shares_card:
        said = "one card: run without --parallel; a second card is what --parallel needs"
        return Finding(said, {"models": []}, f"{said}.")
    link = found.get("links") or None
    rows = []
    for model in models:
        taken = fastest({name: one["ms"] for name, one in model["strategies"].items()})
        row = {"model": model["model"], "measured": taken, "flags": flags_of(taken, settings.ranks), "planned": None}
        if link is not None:
            row["planned"] = planned(model, Link("measured", link["rate"], link["latency"]), settings)
        rows.append(row)
    lines = [
        f"{row['model']}: {row['measured']} was fastest; {' '.join(row['flags']) or 'no --parallel'}" for row in rows
    ]
    page = [line for row, line in zip(rows, lines, strict=True) for line in _lines(row, line)]
    return Finding("; ".join(lines), {"models": rows}, "\n".join(page))


def fastest(ms: dict[str, float]) -> str:
    """Return the fastest of `STRATEGIES`; of equal ones the one nearest to one process's image."""
    nearest = (ALONE, "sync", "otil", "distrifusion")
    least = min(ms[name] for name in STRATEGIES)
    return next(name for name in nearest if ms[name] <= TIE * least)


def flags_of(strategy: str, ranks: int) -> list[str]:
    """Return the flags of `xfuser` for a strategy on so many patches."""
    return [] if strategy == ALONE else ["--parallel", strategy, "--patch_degree", str(ranks)]


def planned(model: dict[str, Any], link: Link, settings: Any) -> dict[str, Any]:
    """Return what the planner takes of all degrees, with the measured link and one process's measured step."""
    network = find_network(model["model"])
    job = Job(network, model["size"], model["size"], network.batch, getattr(torch, model["dtype"]), network.text)
    machine = Machine(link, cores=None if settings.cards else torch.get_num_threads())
    options, _ = options_of(job, degrees_of(settings.ranks, job, None, None), PLANNED_STEPS)
    seconds = model["strategies"][ALONE]["ms"] / 1e3
    advice = advise([option.timed(machine, seconds) for option in options], network.is_unet, bar_of(NEAR))
    return {"reason": advice.reason, "command": command_of(advice.option, job, model["model"], PLANNED_STEPS)}


def _lines(row: dict[str, Any], line: str) -> list[str]:
    lines = [f"- {line}."]
    if row["planned"] is not None:
        lines += [
            f"- Predicted by `otil-xdit plan` from the measured link and one process's step, for all ways to share the "
            f"ranks out: {row['planned']['reason']}.",
            "",
            f"        {row['planned']['command']}",
            "",
        ]
    return lines
