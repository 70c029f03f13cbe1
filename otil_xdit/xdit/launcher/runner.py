"""What every rank runs: xfuser's own runner, with the plugin hooked in.

torchrun --nproc_per_node 2 -m otil_xdit.xdit.launcher.runner --model tiny-dit --parallel otil --prompt "a red circle"
"""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial, wraps
from types import ModuleType
from typing import Any

from otil_xdit.errors import ExchangeTimeout, FlagError, NotFinite
from otil_xdit.xdit.launcher.agent import leave_error, one_line
from otil_xdit.xdit.launcher.orphans import end_with_parent
from otil_xdit.xdit.launcher.processes import LAUNCH_MARK, PATIENCE_SECONDS
from otil_xdit.xdit.launcher.quiet import QUIET_MARK, say_little
from otil_xdit.xdit.launcher.saving import save_somewhere
from otil_xdit.xdit.models.unets import register_folder
from otil_xdit.xdit.plugin.register import register

EXPECTED = (ValueError, AssertionError, NotImplementedError, OSError, ExchangeTimeout, NotFinite)
"""Errors whose message is meant for whoever started the ranks; others come with their traceback."""


def main(work: Callable[[ModuleType], object] | None = None) -> int:
    """Run xfuser's runner on this rank.

    Args:
        work: what to do with xfuser's module ``runner``, with the plugin hooked in; None for its own main block, which
            makes one image.

    Returns:
        The exit code: 2 for flags that cannot be run, 1 for other errors that one line says.
    """
    end_with_parent(PATIENCE_SECONDS)
    rank = int(os.environ.get("RANK") or 0)
    if rank != 0:
        logging.getLogger("otil_xdit").setLevel(logging.WARNING)
    if rank != 0 or LAUNCH_MARK in os.environ:
        _say_nothing_about_flags()
    register()
    try:
        runner = importlib.import_module("xfuser.runner")
        # The launcher takes no abbreviations, and they would be other flags here.
        vars(runner)["FlexibleArgumentParser"] = partial(runner.FlexibleArgumentParser, allow_abbrev=False)
        _take_folders(runner.xFuserModelRunner)
        save_somewhere(runner.xFuserModelRunner)
        if QUIET_MARK in os.environ:
            say_little(runner.xFuserModelRunner)
        (work or run_main_block)(runner)
    except EXPECTED as error:
        _say(error, rank)
        return 2 if isinstance(error, FlagError) else 1
    return 0


def _say(error: BaseException, rank: int) -> None:
    """Leave an error to the launcher, which says that of the rank that failed first; without it rank 0 says its own."""
    if QUIET_MARK not in os.environ and not isinstance(error, FlagError):
        traceback.print_exception(error)
    is_left = leave_error(error)
    if rank == 0 and not (is_left and LAUNCH_MARK in os.environ):
        print(f"xfuser: error: {one_line(error)}", file=sys.stderr)


def run_main_block(module: ModuleType) -> None:
    """Execute what stands under the module's ``if __name__ == "__main__":``, in the imported module.

    ``runpy`` would execute a second copy of the whole module, which would not see what `otil_xdit.xdit.cpu` replaced
    in the imported one.

    Raises:
        RuntimeError: when the module does not end in such a block.
    """
    last = ast.parse(inspect.getsource(module)).body[-1]
    if not (isinstance(last, ast.If) and "__main__" in ast.unparse(last.test)):
        raise RuntimeError(f"{module.__name__} has no main block; otil-xdit does not know this version of xfuser")
    exec(compile(ast.Module(last.body, type_ignores=[]), str(module.__file__), "exec"), vars(module))


def _take_folders(runner_class: Any) -> None:
    """Let xfuser's runner find a model that is named by its folder."""
    select = runner_class._select_model

    @wraps(select)
    def _select_model(self: Any, model_name: str, config: Any) -> Any:
        register_folder(model_name)
        return select(self, model_name, config)

    runner_class._select_model = _select_model


def _say_nothing_about_flags() -> None:
    """Silence what the launcher, or rank 0, says as well."""
    for name in ("runtime.strategies", "xdit.flags", "xdit.versions"):
        logging.getLogger(f"otil_xdit.{name}").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
