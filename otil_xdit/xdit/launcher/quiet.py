"""What a rank says under ``xfuser --parallel``: one line before, one after, and what goes wrong.

xDiT's runner prints all its flags, and every library its own notices, on every rank. `QUIET_ENVIRONMENT` silences what
is said while modules are imported, `say_little` the rest. Errors, tracebacks and this package's warnings stay.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Mapping
from functools import wraps
from typing import Any

from otil_xdit.xdit.cpu import has_accelerator
from otil_xdit.xdit.flags.degrees import degree
from otil_xdit.xdit.plugin.args import choice_of

QUIET_MARK = "OTIL_XDIT_QUIET"
"""Environment variable by which the launcher tells the ranks to say little."""

QUIET_ENVIRONMENT = {
    QUIET_MARK: "1",
    "LOG_LEVEL": "ERROR",  # of xfuser's loggers
    "TRANSFORMERS_VERBOSITY": "error",
    # What is left are RuntimeWarnings: of numbers, say.
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning,ignore::UserWarning",
}
"""What quiet ranks are started with, unless the user says otherwise."""

_SAVED = re.compile(r"(?!Timings).* saved to (.+)")
"""What xDiT's runner logs of a file that it has written."""


def say_little(runner_class: Any) -> None:
    """Silence the libraries on this rank; print what runs on what, and where the image is.

    Args:
        runner_class: `xFuserModelRunner`, whose `initialize` and `save` are replaced.
    """
    rank = int(os.environ.get("RANK") or 0)
    # First come, first served: xDiT's own call of it does nothing then.
    logging.basicConfig(format=f"xfuser: {f'rank {rank}: ' if rank else ''}%(message)s", level=logging.WARNING)
    if rank != 0:
        logging.getLogger("diffusers").setLevel(logging.ERROR)
    _hide_loading_bars(rank)
    saved = _SavedFiles()
    initialize, save = runner_class.initialize, runner_class.save

    @wraps(initialize)
    def initialize_after_a_line(self: Any, input_args: dict[str, Any]) -> None:
        if rank == 0:
            print(f"xfuser: {what_runs(self.config, input_args)}", flush=True)
        initialize(self, input_args)

    @wraps(save)
    def save_before_a_line(self: Any, output: Any = None, timings: Any = None, *args: Any, **kwargs: Any) -> None:
        save(self, output, timings, *args, **kwargs)
        for path in saved.paths:
            print(f"xfuser: {path}{what_it_took(self.model.pipe, timings)}", flush=True)

    runner_class.initialize, runner_class.save = initialize_after_a_line, save_before_a_line


def what_runs(config: Any, values: Mapping[str, Any]) -> str:
    """Return a line on model, image, strategy and ranks.

    Args:
        config: the `xFuserArgs` of this run.
        values: the runner's flags by name, with the model's own values for those that were not given.
    """
    size = f"{values['width']} x {values['height']} pixels" if values.get("height") and values.get("width") else None
    steps = f"{values['num_inference_steps']} steps" if values.get("num_inference_steps") else None
    choice = choice_of(config)
    parts = [f"{choice.patch_degree} patch{'es' * (choice.patch_degree > 1)}"] if choice is not None else []
    degrees = {"ulysses_degree": "Ulysses", "use_cfg_parallel": "CFG", "data_parallel_degree": "images at a time"}
    given = {flag: degree(vars(config), flag) for flag in degrees}
    parts += [f"{given[flag]} {name}" for flag, name in degrees.items() if given[flag] > 1]
    strategy = None if choice is None else f"strategy {choice.strategy.name}"
    ranks = int(os.environ.get("WORLD_SIZE") or 1)
    shares = f" ({' x '.join(parts)})" if parts else ""
    where = f"{ranks} rank{'s' * (ranks > 1)}{shares} on {'GPUs' if has_accelerator() else 'the CPU'}"
    return ", ".join(filter(None, (config.model, size, steps, strategy, where)))


def what_it_took(pipe: Any, timings: list[float] | None) -> str:
    """Return the last image's seconds, and what this rank of the image sent for it, where they are known."""
    from otil_xdit.xdit.summary import report  # imports diffusers, and the launcher reads this module's constants

    seconds = f", {timings[-1]:.2f} s" if timings else ""
    made = report(pipe)
    if made is None:
        return seconds
    sent = sum(sum(phases.values()) for phases in made.sent_bytes.values())
    return f"{seconds}, {sent / 1e6:.2f} MB sent by one rank"


class _SavedFiles(logging.Handler):
    """Keep the paths of the files that xDiT's runner has written."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.paths: list[str] = []
        logger = logging.getLogger("xfuser.core.utils.runner_utils")
        logger.setLevel(logging.INFO)  # its other handler has a level of its own
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the path, where the record names one."""
        found = _SAVED.fullmatch(record.getMessage())
        if found:
            self.paths.append(found[1])


def _hide_loading_bars(rank: int) -> None:
    """Hide the bars of files that are read; downloads, which take minutes, keep theirs on rank 0."""
    import diffusers
    import transformers

    hub = importlib.import_module("huggingface_hub.utils")
    shown = not hub.are_progress_bars_disabled()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if rank == 0 and shown:
        hub.enable_progress_bars()
