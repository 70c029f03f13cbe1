"""What xDiT refuses by itself, asked in the launcher: on the ranks it would be a traceback of each, a minute later."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from otil_xdit.errors import FlagError
from otil_xdit.xdit.flags.choice import ParallelChoice
from otil_xdit.xdit.flags.degrees import degree
from otil_xdit.xdit.launcher.early import silence
from otil_xdit.xdit.plugin.args import carry


def check_capabilities(name: str, can: Any, values: Mapping[str, Any]) -> None:
    """Refuse flags that xDiT's model of this name does not know how to follow.

    Args:
        can: its `ModelCapabilities`.
        values: flags by name.

    Raises:
        FlagError: naming the flag.
    """
    for flag in type(can).__annotations__:
        asked = degree(values, flag) > 1 if flag.endswith("_degree") else bool(values.get(flag))
        if asked and not getattr(can, flag):
            raise FlagError(f"--model {name} is not supported together with --{flag}")


def check_backends(values: Mapping[str, Any]) -> None:
    """Refuse an attention backend that xDiT has not.

    Raises:
        FlagError: with those that it has.
    """
    backends = importlib.import_module("xfuser.core.distributed.attention_backend").AttentionBackendType.__members__
    for flag in ("attention_backend", "cross_attention_backend"):
        value = values.get(flag)
        if value is not None and str(value).upper() not in backends:
            known = ", ".join(name.lower() for name in backends)
            raise FlagError(f"--{flag} {value}: no such backend; choose from {known}")


def check_by_xdit(model: Any, values: Mapping[str, Any], choice: ParallelChoice | None, world_size: int) -> None:
    """Have xDiT check the flags as each of its ranks does, without a process group and before weights load.

    Args:
        model: the class in xfuser's registry.
        values: flags by name.
        choice: what they ask for; None without ``--parallel``.
        world_size: number of processes.

    Raises:
        FlagError: with xDiT's words.
    """
    args_class = importlib.import_module("xfuser").xFuserArgs
    known = {one.name for one in fields(args_class)}
    args = carry(args_class(**{name: value for name, value in values.items() if name in known}), choice)
    if choice is not None:
        args.ring_degree = choice.patch_degree
    try:
        with silence(), _as_a_silent_rank():
            args.use_ray, args.ray_world_size = True, world_size  # whose number of ranks xDiT takes as it is given
            args.create_config()
            args.use_ray = False
            runner = model(args)
            runner._validate_args(_with_defaults(model, values))
    except FlagError:
        raise
    except (ValueError, AssertionError) as error:
        raise FlagError(f"--model {values['model']}: {' '.join(str(error).split()) or 'xDiT refuses it'}") from error


def _with_defaults(model: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags, with the model's own values for those that were not given."""
    own = vars(model.default_input_values)
    return {**values, **{name: value for name, value in own.items() if values.get(name) is None}}


@contextmanager
def _as_a_silent_rank() -> Iterator[None]:
    """Have the environment of a rank that writes no log: xDiT logs on the last one only."""
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    os.environ.update(RANK="0", WORLD_SIZE="2")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
