"""The flags of the strategies in xDiT's `xFuserArgs`, and their way into its configs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

from otil_xdit.errors import FlagError
from otil_xdit.runtime.card_agreement import check_cards
from otil_xdit.runtime.strategies import Strategy, get_strategy, strategies
from otil_xdit.xdit.flags.choice import ParallelChoice, choose, implied
from otil_xdit.xdit.flags.degrees import given_patch_degree
from otil_xdit.xdit.flags.options import add_otil_args, options

_CHOICE = "otil_choice"
"""The attribute of an `xFuserArgs`, and of a parallel config, that holds the `CarriedChoice`."""


@dataclass(frozen=True)
class CarriedChoice:
    """A choice that registers the plugin in every process that it is sent to, such as an actor of Ray."""

    choice: ParallelChoice

    def __reduce__(self) -> tuple[Any, ...]:
        strategy = self.choice.strategy
        values = {one.name: getattr(self.choice, one.name) for one in fields(self.choice) if one.name != "strategy"}
        # By name where that will do: a strategy is made of functions, which do not pickle.
        return arrive, (strategy.name if strategies().get(strategy.name) is strategy else strategy, values)


def arrive(strategy: Strategy | str, values: dict[str, Any]) -> CarriedChoice:
    """Make a `CarriedChoice` of what another process has sent, and register the plugin in this one."""
    strategy = get_strategy(strategy) if isinstance(strategy, str) else strategy
    strategy.install()
    return CarriedChoice(ParallelChoice(strategy, **values))


def hook_args(args_class: Any) -> None:
    """Let `xFuserArgs` take, parse, validate and carry what the flags of the strategies ask for."""
    for name in ("add_runner_args", "add_cli_args"):
        setattr(args_class, name, staticmethod(_with_flags(getattr(args_class, name))))
    init = args_class.__init__

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        ours = {option.flag: kwargs.pop(option.flag) for option in options() if option.flag in kwargs}
        init(self, *args, **kwargs)
        if not ours:
            return
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        if "ring_degree" not in kwargs:
            del values["ring_degree"]  # xDiT's default would contradict a patch degree
        choice, resolved = _resolved({**values, **ours})
        self.ring_degree, self.use_cfg_parallel = resolved["ring_degree"], resolved["use_cfg_parallel"]
        carry(self, choice)

    args_class.__init__ = __init__
    from_runner_args, from_cli_args = args_class.from_runner_args.__func__, args_class.from_cli_args.__func__

    @wraps(from_runner_args)
    def from_runner(cls: Any, args: dict[str, Any]) -> Any:
        choice, values = _resolved(args)
        if choice is not None and values.get("use_ray"):
            raise FlagError(NO_ACTORS)
        return carry(from_runner_args(cls, values), choice)

    @wraps(from_cli_args)
    def from_cli(cls: Any, args: argparse.Namespace) -> Any:
        choice, values = _resolved(vars(args))
        return carry(from_cli_args(cls, argparse.Namespace(**values)), choice)

    create_config = args_class.create_config

    @wraps(create_config)
    def create(self: Any) -> Any:
        engine_config, input_config = create_config(self)
        # EngineConfig is frozen; its parallel config is not, and reaches everything that RuntimeState does.
        carry(engine_config.parallel_config, choice_of(self))
        return engine_config, input_config

    args_class.from_runner_args = classmethod(from_runner)
    args_class.from_cli_args = classmethod(from_cli)
    args_class.create_config = create


NO_ACTORS = (
    "--parallel and --use_ray are not supported together here (xDiT's runner starts no actors); give --use_ray to a "
    "script that makes a RayDiffusionPipeline"
)


def carry(holder: Any, choice: ParallelChoice | None) -> Any:
    """Let an `xFuserArgs`, or a parallel config of xDiT, take `choice` along, to other processes too."""
    setattr(holder, _CHOICE, None if choice is None else CarriedChoice(choice))
    return holder


def choice_of(holder: Any) -> ParallelChoice | None:
    """Return what an `xFuserArgs`, or a parallel config of xDiT, carries; None without ``--parallel``."""
    carried: CarriedChoice | None = getattr(holder, _CHOICE, None)
    return None if carried is None else carried.choice


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
    choice = choose(values, _world_size(values))
    if choice is not None and "RANK" in os.environ:  # of ranks only: the launcher may be without cards
        try:
            check_cards(choice.config, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
        except ValueError as error:
            raise FlagError(f"--parallel {choice.strategy.name}: {error}") from None
    ring = choice.patch_degree if choice is not None else values.get("ring_degree") or 1
    return choice, {**implied(values), "ring_degree": ring}


def _world_size(values: dict[str, Any]) -> int | None:
    """Return the number of processes; None where this one belongs to none of them, and a patch degree is given."""
    if values.get("use_ray"):
        return values.get("ray_world_size")
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return None if values.get("parallel") is not None and given_patch_degree(values) is not None else 1
