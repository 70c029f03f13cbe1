"""`python -m otil_xdit.run`: an unchanged script of xDiT or diffusers, with the plugin registered.

A script of xDiT, whose flags are those of `xFuserArgs`, takes the "Otil options" among its own:

    python -m otil_xdit.run cogvideox_usp_example.py --model PATH --parallel otil --patch_degree 2 ...

A script of diffusers knows no flags of ours. Those in front of it say how the pipelines that it loads are run:

    python -m otil_xdit.run --parallel otil --patch_degree 2 draw.py

Each of these pipelines is parallelized when it is called for the first time, and every rank gets the images.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, NoReturn

from otil_xdit.errors import FlagError
from otil_xdit.xdit.cpu import has_accelerator
from otil_xdit.xdit.flags.choice import ParallelChoice, choose, implied
from otil_xdit.xdit.flags.degrees import UngivenDegree, degree
from otil_xdit.xdit.flags.options import add_otil_args
from otil_xdit.xdit.launcher.early import read_early
from otil_xdit.xdit.launcher.processes import CPU_ENVIRONMENT, free_port, run_to_end, visible_devices

MODULE = "otil_xdit.run"
DEGREES = ("data_parallel_degree", "use_cfg_parallel", "ulysses_degree", "pipefusion_parallel_degree")
LOADERS = ("from_pretrained", "from_single_file", "from_pipe")
"""Class methods of diffusers' pipelines that make one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script on this rank, or start the ranks that run it.

    Returns:
        The exit code: 2 for options that cannot be followed, as one line says.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = _parse(arguments)
        processes = _processes(options)
        if "RANK" in os.environ:
            processes = int(os.environ["WORLD_SIZE"])
        choice = choose(_values(options), processes)
    except FlagError as error:
        print(f"{MODULE}: error: {error}", file=sys.stderr)
        return 2
    if "RANK" not in os.environ and (processes > 1 or options.nproc_per_node is not None):
        return _start_ranks(processes, arguments)
    _run(options.script, options.arguments, choice, options.use_cfg_parallel)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FlagError(message)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options in front of the script, the script, and its arguments.

    Raises:
        FlagError: for a wrong option, or a script that is not there.
    """
    parser = _Parser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--nproc_per_node", type=int, metavar="N", help="Processes. Default: the degrees' product.")
    parser.add_argument("--ulysses_degree", type=int, default=1, metavar="N", help="Ranks that share a patch's heads.")
    parser.add_argument("--use_cfg_parallel", action="store_true", help="Share the passes of guidance.")
    add_otil_args(parser)
    parser.add_argument("script", help="A Python file.")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="Its own arguments.")
    options = parser.parse_args(arguments)
    if not Path(options.script).is_file():
        raise FlagError(f"{options.script}: no such file; give options with a value as --name=VALUE or --name VALUE")
    if options.nproc_per_node is not None and options.nproc_per_node < 1:
        raise FlagError(f"--nproc_per_node {options.nproc_per_node}: give a whole number from 1 up")
    return options


def _values(options: argparse.Namespace) -> Mapping[str, Any]:
    return implied({name: value for name, value in vars(options).items() if name not in ("script", "arguments")})


def _processes(options: argparse.Namespace) -> int:
    """Return how many processes are asked for: by number, by the degrees in front of the script, or by its own."""
    if options.nproc_per_node is not None:
        return int(options.nproc_per_node)
    values = _values(options) if options.parallel is not None else implied(_of_script(options.arguments))
    patches = values.get("patch_degree") or values.get("ring_degree")
    others = 1
    for flag in DEGREES:
        others *= degree(values, flag)
    if values.get("parallel") is not None and (patches is None or isinstance(patches, UngivenDegree)):
        return visible_devices() or 2 * others
    return int(patches or 1) * others


def _of_script(arguments: Sequence[str]) -> Mapping[str, Any]:
    """Return the degrees among a script's own arguments; none where they are not as xDiT writes them."""
    try:
        return read_early(arguments)
    except FlagError:
        return {}


def _start_ranks(processes: int, arguments: Sequence[str]) -> int:
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    environment = {**({} if has_accelerator() else CPU_ENVIRONMENT), **os.environ}
    environment.setdefault("OMP_NUM_THREADS", "1")  # as torchrun would, with three lines about it
    return run_to_end([*torchrun, f"--master_port={free_port()}", "-m", MODULE, *arguments], environment)


def _run(script: str, arguments: Sequence[str], choice: ParallelChoice | None, use_cfg_parallel: bool) -> None:
    """Register the plugin and run the script as Python would."""
    from otil_xdit.xdit.plugin.register import register

    register()
    if has_accelerator() and "LOCAL_RANK" in os.environ:
        import torch

        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means in the script
    if choice is not None:
        hook_pipelines(partial(parallelized, choice=choice, use_cfg_parallel=use_cfg_parallel))
    sys.argv[:] = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


def hook_pipelines(parallelize: Callable[[Any], Any]) -> None:
    """Have every pipeline that is loaded from now on parallelized when it is called for the first time.

    Args:
        parallelize: returns what is to be called in its place.
    """
    from diffusers import DiffusionPipeline
    from diffusers.loaders import FromSingleFileMixin

    for owner in (DiffusionPipeline, FromSingleFileMixin):
        for name in LOADERS:
            if name in vars(owner):
                setattr(owner, name, classmethod(_watched(vars(owner)[name].__func__, parallelize)))


def _watched(load: Callable[..., Any], parallelize: Callable[[Any], Any]) -> Callable[..., Any]:
    from otil_xdit.networks.class_swap import is_swapped, swap_class

    @wraps(load)
    def loaded(kind: Any, *args: Any, **kwargs: Any) -> Any:
        pipe = load(kind, *args, **kwargs)
        if hasattr(pipe, "scheduler") and not is_swapped(pipe):
            vars(pipe)["_otil_parallelize"] = parallelize
            swap_class(pipe, _called_once)
        return pipe

    return loaded


@cache
def _called_once(kind: Any) -> type:
    """Return a subclass of a pipeline's class whose first call parallelizes it."""
    from otil_xdit.networks.class_swap import restore_class, subclass_of, swap_class

    @wraps(kind.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        restore_class(self)
        made = vars(self).pop("_otil_parallelize")(self)
        if made is not self:
            vars(self)["_otil_made"] = made
            swap_class(self, _called_in_its_place)
        return made(*args, **kwargs) if made is self else self(*args, **kwargs)

    return subclass_of(kind, {"__call__": __call__})


@cache
def _called_in_its_place(kind: Any) -> type:
    """Return a subclass of a pipeline's class that calls xDiT's wrapper of it, and has its output on all ranks."""
    from otil_xdit.networks.class_swap import subclass_of

    @wraps(kind.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return shared_by_last_rank(self._otil_made(*args, **kwargs))

    return subclass_of(kind, {"__call__": __call__})


def parallelized(pipe: Any, choice: ParallelChoice, use_cfg_parallel: bool) -> Any:
    """Parallelize a pipeline as the options in front of the script say."""
    import torch
    import torch.distributed as dist

    from otil_xdit.xdit.api import parallelize_as

    made = parallelize_as(pipe, choice, use_cfg_parallel)
    if dist.is_initialized():
        seed = [torch.seed()]
        dist.broadcast_object_list(seed)
        torch.manual_seed(seed[0])  # scripts for one process need give no generator
    return made


def shared_by_last_rank(output: Any) -> Any:
    """Return on all ranks what an xDiT wrapper gives on the last; tensors come to the other ranks on the CPU."""
    import torch
    import torch.distributed as dist
    from torch.utils._pytree import tree_map_only

    last = dist.get_world_size() - 1
    shared = [tree_map_only(torch.Tensor, torch.Tensor.cpu, output) if dist.get_rank() == last else None]
    dist.broadcast_object_list(shared, src=last)
    return output if dist.get_rank() == last else shared[0]
