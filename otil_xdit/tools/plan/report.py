"""What `otil-xdit plan` prints: bytes, memory and time of each strategy, and which one to take."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import torch

from otil_xdit.dryrun.flops import flops_of
from otil_xdit.dryrun.job import Job, ParallelDegrees
from otil_xdit.dryrun.networks import check_size, find_network, with_controlnets
from otil_xdit.tools.common.cards import REACHED
from otil_xdit.tools.common.links import LINKS, parse_link
from otil_xdit.tools.plan.advice import advise, bar_of
from otil_xdit.tools.plan.arguments import card_of, cards_differ, rates_of
from otil_xdit.tools.plan.fit import WITHIN, compare, fit, orders, read_machine, write_machine
from otil_xdit.tools.plan.latency import TERMS, Machine
from otil_xdit.tools.plan.observations import LOOPBACK, Observation, read_bench
from otil_xdit.tools.plan.options import Option, degrees_of, fastest_of_each, options_of
from otil_xdit.tools.plan.tables import (
    as_data,
    bytes_table,
    call_of,
    command_of,
    comparison_table,
    memory_table,
    time_table,
)

MISSING = (
    "give --step_time SECONDS (measured: one process's step), --flops RATE (operations a second that one process "
    "reaches) or --card NAME; bytes and memory above need none"
)


def run(arguments: argparse.Namespace) -> None:
    """Print the tables and the advice.

    Raises:
        ValueError: for arguments that no run could have, and where a prediction lacks what it needs.
    """
    if arguments.fit or arguments.check:
        (fit_machine if arguments.fit else check_machine)(arguments)
        return
    job = job_of(arguments)
    machine = machine_of(arguments)
    bar = bar_of(arguments.near)
    candidates = degrees_of(
        arguments.gpus,
        job,
        arguments.cfg_degree,
        arguments.ulysses_degree,
        arguments.patch_shares or (),
        rates_of(arguments),
    )
    options, refused = options_of(job, candidates, arguments.steps, arguments.card is not None, cards_differ(arguments))
    one_process = step_time_of(arguments, job)
    if machine is not None and one_process is not None:
        options = [option.timed(machine, one_process) for option in options]
    best = fastest_of_each(options)
    advice = advise(options, job.network.is_unet, bar) if options[0].seconds is not None else None
    if arguments.json:
        print(json.dumps(as_data(job, options, refused, advice, arguments.steps), indent=1))
    else:
        show(job, best, refused, arguments)
        if machine is not None and one_process is not None and advice is not None:
            show_times(best, machine, one_process, arguments.steps)
            print(f"Take {advice.reason}.\n")
            chosen = advice.option
            in_python = bool(job.network.controls)  # `xfuser` has no flags for ControlNets
            command = call_of(chosen) if in_python else command_of(chosen, job, arguments.model, arguments.steps)
            print(f"    {command}")
    if advice is None:
        raise ValueError(MISSING if one_process is None else f"give --link ({', '.join(LINKS)}, or RATE[,LATENCY])")


def job_of(arguments: argparse.Namespace) -> Job:
    """Return what is to be made.

    Raises:
        ValueError: naming flag, value and what would be accepted.
    """
    network = with_controlnets(find_network(arguments.model), arguments.controlnets)
    size = arguments.size or 1024
    height, width = arguments.height or size, arguments.width or size
    check_size(network, height, width)
    passes = 1 if arguments.no_guidance else network.batch
    batch = arguments.images * passes
    text = arguments.text_tokens or network.text
    return Job(network, height, width, batch, getattr(torch, arguments.dtype), text, not arguments.no_guidance)


def machine_of(arguments: argparse.Namespace) -> Machine | None:
    """Return the machine of --machine and --link; None where no link is known."""
    link = None if arguments.link is None else parse_link(arguments.link)
    if arguments.machine is None:
        card = card_of(arguments)
        return None if link is None else Machine(link, card=card)
    machine, _ = read_machine(arguments.machine)
    if link is None:
        return None if machine.link == LOOPBACK else machine
    return replace(machine, link=link)


def fit_machine(arguments: argparse.Namespace) -> None:
    """Find a machine's terms, and write them."""
    if arguments.out is None:
        raise ValueError("--fit writes what it finds; give --out FILE")
    observations = observed(arguments.fit)
    machine = fit(observations)
    write_machine(machine, [observation.name for observation in observations], arguments.out)
    print(f"Fitted to {len(observations)} runs; written to {arguments.out}:\n")
    for term, value in zip(TERMS, machine.terms, strict=True):
        print(f"    {term:12} {value:.4g}")
    print()
    print(comparison_table(compare(observations, machine, [])))


def check_machine(arguments: argparse.Namespace) -> None:
    """Print the model against what was measured."""
    if arguments.machine is None:
        raise ValueError("--check predicts with a machine's terms; give --machine FILE, which --fit writes")
    machine, fitted = read_machine(arguments.machine)
    comparisons = compare(observed(arguments.check), machine, fitted)
    print(comparison_table(comparisons), "\n")
    fresh = [comparison for comparison in comparisons if not comparison.fitted]
    if len(fresh) < len(comparisons):
        print(f"{len(comparisons) - len(fresh)} runs are those that the terms were fitted to, and not counted.")
    good = sum(abs(comparison.error) <= WITHIN for comparison in fresh)
    print(f"The time of a step is within {WITHIN:.0%} in {good} of {len(fresh)} runs.")
    for group, (alike, pairs) in orders(fresh).items():
        print(f"{group}: {alike} of {pairs} pairs of strategies in the order that was measured.")
    wrong = [comparison.observation.name for comparison in comparisons if comparison.observation.counts_agree is False]
    print(f"Bytes and messages differ from those that were counted in: {'; '.join(wrong) or 'none'}.")


def observed(paths: list[str]) -> list[Observation]:
    """Return all runs of several benches; print those that say nothing."""
    found: list[Observation] = []
    for path in paths:
        observations, left = read_bench(path)
        found += observations
        for line in left:
            print(f"Left out: {line}")
    if not found:
        raise ValueError(
            f"{' '.join(paths)}: no run on several ranks that the model knows, with one process's beside it"
        )
    return found


def step_time_of(arguments: argparse.Namespace, job: Job) -> float | None:
    """Return the seconds of one process's step, measured or from its operations; None where nothing is given."""
    if arguments.step_time is not None:
        return float(arguments.step_time)
    rate = arguments.flops
    card = card_of(arguments)
    if rate is None and card is not None:
        rate = card.reached
    return None if rate is None else flops_of(job) / rate


def show(job: Job, best: list[Option], refused: dict[ParallelDegrees, str], arguments: argparse.Namespace) -> None:
    """Print bytes and memory."""
    passes = f"{job.batch} image{'s' if job.batch > 1 else ''} in a pass"
    print(
        f"{job.network.name}, {job.height} x {job.width} pixels, {arguments.dtype}, {passes}, {arguments.gpus} ranks\n"
    )
    print("Bytes that a rank hands over in a step (of the rank that sends most):\n")
    print(bytes_table(best), "\n")
    print("MB (10^6 bytes) that a rank keeps for the exchange:\n")
    print(memory_table(best), "\n")
    for degrees, reason in refused.items():
        print(f"Left out: {degrees}: {reason}")
    if cards_differ(arguments):
        print(f"Left out: strategies that need cards of one compute capability; --card {arguments.card} has several")


def show_times(best: list[Option], machine: Machine, one_process: float, steps: int) -> None:
    """Print predictions, and what they rest on."""
    link = machine.link
    said = ", ".join(f"{term} {value:.3g}" for term, value in zip(TERMS, machine.terms, strict=True))
    card = machine.card
    if card is not None:
        said = (
            f"{card.name} ({card.source}): {REACHED:.0%} of {card.peak / 1e12:g} TFLOP/s, {card.memory_rate / 1e9:g} "
            f"GB/s, {card.launch * 1e6:g} us a launch. The share and the launch are estimates"
        )
    elif machine == Machine(link):
        said = "for the link alone: without --machine or --card the exchange's own work is free"
    print(f"\nPredicted, {link.name}: {link.rate / 1e9:g} GB/s, {link.latency * 1e6:g} us; {said}.")
    print(f"One process: {one_process * 1e3:.1f} ms a step, {one_process * steps:.2f} s.\n")
    print(time_table(best, steps), "\n")
