"""The flags of the strategies in xDiT's `xFuserArgs`, and their way into its configs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from otil_xdit.xdit.flags.choice import ParallelChoice, choose, implied
from otil_xdit.xdit.flags.options import add_otil_args

_CHOICE = "otil_choice"
"""The attribute of an `xFuserArgs`, and of a parallel config, that holds the `ParallelChoice`."""


def hook_args(args_class: Any) -> None:
    """Let `xFuserArgs` parse, validate and carry what the flags of the strategies ask for."""
    for name in ("add_runner_args", "add_cli_args"):
        setattr(args_class, name, staticmethod(_with_flags(getattr(args_class, name))))
    from_runner_args, from_cli_args = args_class.from_runner_args.__func__, args_class.from_cli_args.__func__

    @wraps(from_runner_args)
    def from_runner(cls: Any, args: dict[str, Any]) -> Any:
        choice, values = _resolved(args)
        return carry(from_runner_args(cls, values), choice)

    @wraps(from_cli_args)
    def from_cli(cls: Any, args: argparse.Namespace) -> Any:
        choice, values = _resolved(vars(args))
        return carry(from_cli_args(cls, argparse.Namespace(**values)), choice)

    create_config = args_class.create_config

    @wraps(create_config)
    def create(self: Any) -> Any:
        engine_config, input_config = create_config(self)
        choice = getattr(self, _CHOICE, None)
        if choice is not None:
            # EngineConfig is frozen; its parallel config is not, and reaches everything that RuntimeState does.
            setattr(engine_config.parallel_config, _CHOICE, choice)
        return engine_config, input_config

    args_class.from_runner_args = classmethod(from_runner)
    args_class.from_cli_args = classmethod(from_cli)
    args_class.create_config = create


def carry(args: Any, choice: ParallelChoice | None) -> Any:
    """Let an `xFuserArgs` take `choice` along to the configs that it creates."""
    setattr(args, _CHOICE, choice)
    return args


def carried_by(args: Any) -> ParallelChoice | None:
    """Return what an `xFuserArgs` carries; None without ``--parallel``."""
    choice: ParallelChoice | None = getattr(args, _CHOICE, None)
    return choice


def choice_of(parallel_config: Any) -> ParallelChoice | None:
    """Return what a parallel config of xDiT carries; None without ``--parallel``."""
    choice: ParallelChoice | None = getattr(parallel_config, _CHOICE, None)
    return choice


def _with_flags(add_args: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return xDiT's function that adds flags to a parser, extended by the "Otil options"."""

    @wraps(add_args)
    def add(parser: Any) -> Any:
        parser = add_args(parser)
        add_otil_args(parser)
        return parser

    return add


def _resolved(values: dict[str, Any]) -> tuple[ParallelChoice | None, dict[str, Any]]:
    """Return the choice that flags stand for, and the flags with the patch degree in the ring slot."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    choice = choose(values, world_size)
    ring = choice.patch_degree if choice is not None else values.get("ring_degree") or 1
    return choice, {**implied(values), "ring_degree": ring}
