"""`xfuser`: the launcher. It takes every flag of `xdit`, and those of the "Otil options".

All flags are checked here, before any rank is started: a wrong one costs one line on stderr and exit code 2. What can
be told without xfuser is told before it is imported (`otil_xdit.xdit.launcher.early`).
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NoReturn

from otil_xdit import __version__
from otil_xdit.catalog.dits import why_refused
from otil_xdit.catalog.models import find_record
from otil_xdit.catalog.trust import check_trust
from otil_xdit.errors import FlagError
from otil_xdit.xdit.cpu import has_accelerator
from otil_xdit.xdit.flags.choice import ParallelChoice, choose, implied, implies_cfg_parallel
from otil_xdit.xdit.flags.degrees import OTHER_DEGREES, degree, given_patch_degree
from otil_xdit.xdit.flags.parsing import check_values
from otil_xdit.xdit.launcher.by_xdit import check_backends, check_by_xdit, check_capabilities
from otil_xdit.xdit.launcher.early import (
    check_files,
    check_flags,
    check_model_folder,
    check_model_name,
    check_prompts,
    read_early,
    silence,
    unknown_model,
)
from otil_xdit.xdit.launcher.processes import CPU_ENVIRONMENT, free_port, run_to_end, visible_devices
from otil_xdit.xdit.launcher.quiet import QUIET_ENVIRONMENT
from otil_xdit.xdit.launcher.runner_registry import model_registry
from otil_xdit.xdit.models.unets import check_source, register_folder
from otil_xdit.xdit.plugin.args import NO_ACTORS

RUNNER = "otil_xdit.xdit.launcher.runner"
AGENT = "otil_xdit.xdit.launcher.agent"
"""What every rank runs, and torchrun, which starts it."""

TORCHRUN_FLAGS = {
    "nproc_per_node": (None, "Processes on this machine. Default: the product of the degrees."),
    "nnodes": ("1", "Machines."),
    "node_rank": ("0", "This machine's number, from 0."),
    "master_addr": ("localhost", "Address of machine 0."),
    "master_port": ("29500", "Port there. Default with --parallel on one machine: a free one; otherwise 29500."),
}
"""Flags that torchrun gets instead of the runner: xdit's defaults and a line for ``--help``."""

PATCHES_ON_CPU = 2

VERBOSE = "--verbose"


@dataclass(frozen=True)
class Launch:
    """A torchrun to start.

    Attributes:
        command: the program and its arguments.
        environment: all of its environment.
        note: a line for the user, or None.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    note: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Launch the ranks and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(format="xfuser: %(message)s", level=logging.WARNING)
    if "--version" in arguments:
        others = ", ".join(f"{package} {version(package)}" for package in ("xfuser", "diffusers", "torch"))
        print(f"otil-xdit {__version__} ({others})")
        return 0
    try:
        launch = plan(arguments, os.environ)
    except FlagError as error:
        print(f"xfuser: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if launch.note is not None:
        print(f"xfuser: {launch.note}", file=sys.stderr)
    return run_to_end(launch.command, launch.environment)


def plan(arguments: Sequence[str], environment: Mapping[str, str], runner: str | None = None) -> Launch:
    """Check all flags and find out what to start.

    Args:
        arguments: the command line, without the program.
        environment: all variables of this process, which overrule those that the ranks are given.
        runner: the module that every rank runs, which understands the same flags; None for xfuser's runner.

    Raises:
        FlagError: for a command line that cannot be run.
    """
    check_values(arguments)
    torchrun, runner_arguments = split_torchrun_flags(arguments)
    if not {"-h", "--help"} & set(arguments):
        _check_early(runner_arguments, torchrun)
    values = implied(parse(runner_arguments))
    runner_arguments = [argument for argument in runner_arguments if argument != VERBOSE]
    if values.get("parallel") is not None and values.get("use_ray"):
        raise FlagError(NO_ACTORS)
    _check_model(values)
    note = None
    if values.get("parallel") is None:
        choice, by_degrees = choose(values, None), _processes_of_xdit(runner_arguments)
        torchrun.setdefault("nproc_per_node", by_degrees)
        world_size = int(by_degrees)
    else:
        torchrun["nproc_per_node"], choice, note = _processes(values, torchrun)
        if torchrun.get("nnodes", "1") == "1":
            torchrun.setdefault("master_port", str(free_port()))
        world_size = int(torchrun["nproc_per_node"]) * _whole("nnodes", torchrun.get("nnodes", "1"))
    check_backends(values)
    check_by_xdit(model_registry()[values["model"]], values, choice, world_size)
    check_source(values["model"], bool(values.get("allow_pickle")))
    command = (
        sys.executable,
        *("-m", AGENT),
        *(f"--{name}={torchrun.get(name, default)}" for name, (default, _) in TORCHRUN_FLAGS.items()),
        *("-m", runner or RUNNER),
        *runner_arguments,
    )
    is_quiet = values.get("parallel") is not None and not values["verbose"]
    return Launch(command, {**_environment(is_quiet, torchrun["nproc_per_node"]), **environment}, note)


def _environment(is_quiet: bool, processes: str) -> dict[str, str]:
    """Return the environment variables of the ranks, which the user's own overrule."""
    quiet = dict(QUIET_ENVIRONMENT) if is_quiet else {}
    if not has_accelerator():
        return {**CPU_ENVIRONMENT, **quiet}
    if is_quiet and processes != "1":
        quiet["OMP_NUM_THREADS"] = "1"  # torchrun would set it too, and say so in three lines
    return quiet


def split_torchrun_flags(arguments: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return torchrun's flags by name, and all other arguments as they are.

    Raises:
        FlagError: for one without a value.
    """
    torchrun: dict[str, str] = {}
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, has_value, value = argument.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if name not in TORCHRUN_FLAGS:
            others.append(argument)
            continue
        if not has_value:
            value = next(rest, "")
        if not value:
            raise FlagError(f"{flag} needs a value")
        torchrun[name] = value
    return torchrun, others


def parse(runner_arguments: Sequence[str]) -> dict[str, Any]:
    """Return the runner's flags by name, parsed by xfuser's own parser; ``--help`` ends the process.

    Raises:
        FlagError: for what the parser does not understand.
    """
    model_registry()  # imports xfuser, quietly
    config = importlib.import_module("xfuser.config")

    class Parser(config.FlexibleArgumentParser):  # type: ignore[name-defined]  # imported by name
        def error(self, message: str) -> NoReturn:
            raise FlagError(message)

    # The runner's parser would take an abbreviation for another flag than the launcher's does.
    parser = Parser(
        prog="xfuser", allow_abbrev=False, description="xDiT on several devices, with one image cut into patches."
    )
    config.xFuserArgs.add_runner_args(parser)
    _add_launch_help(parser)
    return vars(parser.parse_args(list(runner_arguments)))


def _add_launch_help(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Launch options")
    for name, (default, text) in TORCHRUN_FLAGS.items():
        group.add_argument(f"--{name}", metavar=name.rsplit("_")[-1].upper(), help=text, default=default)
    group.add_argument(VERBOSE, action="store_true", help="With --parallel: show all that xDiT and its libraries log.")
    group.add_argument("--version", action="store_true", help="Print versions and exit.")


def _check_model(values: Mapping[str, Any]) -> None:
    """Check that xfuser has the model, and that it runs with the degrees and strategy that are asked for."""
    registry = model_registry()
    name = values["model"]
    register_folder(name)
    if name not in registry:
        raise FlagError(unknown_model(name, registry))
    check_trust(name, registry[name], values)
    can = registry[name].capabilities
    why_not = why_refused(find_record(name), can, bool(values.get("allow_untested")))
    if values.get("parallel") is not None and why_not is not None:
        raise FlagError(f"--model {name} is not supported together with --parallel: {why_not}")
    check_capabilities(name, can, values)


def _check_early(runner_arguments: Sequence[str], torchrun: Mapping[str, str]) -> None:
    """Check what can be told without importing xfuser; the same follows with all flags."""
    values = implied(read_early(runner_arguments))
    with silence():
        if values.get("parallel") is None:
            choose(values, None)
        else:
            _processes(values, torchrun)
    check_flags(runner_arguments, (*TORCHRUN_FLAGS, VERBOSE[2:], "version", "allow_pickle"))
    check_model_name(values.get("model"))
    check_model_folder(values)
    check_prompts(values)
    check_files(values)


def _processes_of_xdit(runner_arguments: Sequence[str]) -> str:
    """Return the processes on this machine without ``--parallel``, as `xdit` counts them."""
    try:
        return str(importlib.import_module("xfuser.cli").get_nproc_from_args(list(runner_arguments)))
    except ValueError as error:
        raise FlagError(f"a degree is not a whole number: {error}") from error


def _processes(values: Mapping[str, Any], torchrun: Mapping[str, str]) -> tuple[str, ParallelChoice | None, str | None]:
    """Return the processes on this machine under ``--parallel``, what is chosen, and a note where nobody gave them."""
    nodes = _whole("nnodes", torchrun.get("nnodes", "1"))
    devices = visible_devices()
    others = math.prod(degree(values, flag) for flag in OTHER_DEGREES)
    given, note = torchrun.get("nproc_per_node"), None
    patch_degree = given_patch_degree(values)
    if given is not None:
        world_size = nodes * (devices or 1 if given in ("auto", "gpu") else _whole("nproc_per_node", given))
    elif patch_degree is not None:
        world_size = patch_degree * others
    else:
        patches = 1 if implies_cfg_parallel(values) else PATCHES_ON_CPU
        world_size = nodes * devices if devices else patches * others
        shown = "1 patch" if patches == 1 else f"{patches} patches"
        reason = "one for each visible device" if devices else f"{shown}, as there is no accelerator"
        note = f"no --patch_degree and no --nproc_per_node: {world_size} processes, {reason}"
    choice = choose(values, world_size)
    here, rest = divmod(world_size, nodes)
    if rest:
        raise FlagError(f"--nnodes {nodes} does not divide the {world_size} processes that the degrees ask for")
    if devices and here > devices:
        raise FlagError(f"{here} processes on this machine need as many devices, and {devices} are visible")
    return str(here), choice, note


def _whole(name: str, text: str) -> int:
    """Return the number from 1 up that a flag of torchrun is."""
    if not text.isdecimal() or int(text) < 1:
        raise FlagError(f"--{name} is {text!r}; give a whole number from 1 up")
    return int(text)
