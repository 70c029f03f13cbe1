"""What of a command line is wrong can be said at once, before xfuser and diffusers are imported, which takes seconds.

A parser of few flags reads those that the checks below look at; the rest is left to xDiT's own parser. What xDiT knows
by name, flags and models, is read from the text of its modules.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from otil_xdit.catalog.bundled import BUNDLED
from otil_xdit.catalog.models import find_record
from otil_xdit.catalog.numbers import FLAG_NUMBERS
from otil_xdit.catalog.trust import check_folder
from otil_xdit.catalog.weight_files import check_weights
from otil_xdit.errors import FlagError
from otil_xdit.xdit.flags.degrees import degree
from otil_xdit.xdit.flags.options import add_otil_args, add_unet_args

SWITCHES = (
    *("use_cfg_parallel", "use_torch_compile", "use_teacache", "use_fbcache", "use_fp8_comms"),
    *("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_cpu_offload", "allow_pickle"),
)
TEXTS = ("model", "output_directory", "dataset_path", "cache_method")
LISTS = ("prompt", "negative_prompt", "input_images")
"""Flags of xDiT that are read early, besides those with numbers."""

PROBE_BYTES = 1 << 16
"""Written to the output folder to see whether there is room: less than the smallest image."""


def read_early(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the flags that are looked at early; what is not given, or not known here, is None or missing.

    Raises:
        FlagError: for a value that is not of its flag's kind.
    """
    parser = _Parser(prog="xfuser", add_help=False, allow_abbrev=False)
    for name, numbers in FLAG_NUMBERS.items():
        parser.add_argument(f"--{name}", type=int if numbers.whole else float)
    parser.add_argument("--ring_degree", type=int)
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    for name in TEXTS:
        parser.add_argument(f"--{name}")
    for name in LISTS:
        parser.add_argument(f"--{name}", nargs="*")
    add_otil_args(parser)
    add_unet_args(parser)
    return vars(parser.parse_known_args([_underscored(argument) for argument in arguments])[0])


def check_flags(arguments: Iterable[str], ours: Iterable[str]) -> None:
    """Refuse flags that neither xDiT nor this package has.

    Args:
        arguments: the command line.
        ours: names of flags besides those of `read_early`.

    Raises:
        FlagError: naming the first one, and what is spelled like it.
    """
    known = {*_names_in_xfuser("config", r'"--([\w-]+)"'), *ours}
    if len(known) < 20:
        return  # another xfuser, whose parser will say it
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    add_otil_args(parser)
    add_unet_args(parser)
    known |= {option[2:] for action in parser._actions for option in action.option_strings}
    for argument in arguments:
        flag = _underscored(argument).partition("=")[0]
        name = flag.removeprefix("--")
        if flag == name or not name or " " in flag or name in known or name.removeprefix("no_") in known:
            continue
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        raise FlagError(f"unrecognized arguments: {flag}" + (f"; did you mean --{nearest[0]}?" if nearest else ""))


def check_model_name(model: str | None) -> None:
    """Refuse a model that is neither in xfuser's modules nor in the catalog, nor a folder.

    Raises:
        FlagError: naming those that are spelled like it.
    """
    models = _models_of_xfuser()
    if not model or not models or "xfuser" in sys.modules:  # otherwise its registry, which may have more, is asked
        return
    if model not in models and model not in BUNDLED and find_record(model) is None and not Path(model).is_dir():
        raise FlagError(unknown_model(model, (*models, *BUNDLED)))


def check_model_folder(values: Mapping[str, Any]) -> None:
    """Refuse a folder whose weights are pickles, missing or cut off; no weights are read for that.

    Raises:
        FlagError: naming the file.
    """
    model, allow_pickle = values.get("model"), bool(values.get("allow_pickle"))
    if model in BUNDLED or model in _models_of_xfuser():
        return  # a folder of the same name does not hide it
    if model and (Path(model) / "model_index.json").is_file():
        check_folder(model, allow_pickle, trust_remote_code=True)  # code is looked at when all flags are known
        check_weights(model, allow_pickle)


def _models_of_xfuser() -> frozenset[str]:
    return _names_in_xfuser("model_executor/models/runner_models", r'@register_model\("([^"]+)"\)')


def unknown_model(name: str, known: Iterable[str]) -> str:
    """Return what to say about a model that is not in xfuser's registry."""
    spelled = {model.lower(): model for model in known}
    nearest = difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(spelled[model] for model in nearest)}?" if nearest else ""
    what = "model or folder" if "/" in name else "model"
    return f"--model {name}: no such {what}{hint} (`otil-xdit models` lists all)"


def check_prompts(values: Mapping[str, Any]) -> None:
    """Check that there is a prompt for every group of ranks that makes images of its own, and enough negative ones.

    Raises:
        FlagError: naming the flag.
    """
    prompts, negative = values.get("prompt"), values.get("negative_prompt")
    if values.get("dataset_path"):
        return
    if not prompts:
        raise FlagError(f'--prompt {"is missing" if prompts is None else "has no text"}; give --prompt "..."')
    replicas = degree(values, "data_parallel_degree")
    if isinstance(prompts, list) and len(prompts) < replicas:
        raise FlagError(
            f"--data_parallel_degree {replicas} needs as many prompts, and {len(prompts)} given; "
            'give --prompt "..." "..." or a smaller degree'
        )
    if isinstance(prompts, list) and isinstance(negative, list) and len(negative) not in (0, 1, len(prompts)):
        raise FlagError(
            f"--negative_prompt has {len(negative)} texts and --prompt {len(prompts)}; give one, or as many"
        )


def check_files(values: Mapping[str, Any]) -> None:
    """Check that files to be read are there, and that the images can be saved: xDiT would find out when they are done.

    Raises:
        FlagError: naming flag and file.
    """
    images = values.get("input_images") or []
    for flag, path in (("dataset_path", values.get("dataset_path")), *(("input_images", path) for path in images)):
        if path and "://" not in str(path) and not Path(path).is_file():
            raise FlagError(f"--{flag} {path}: no such file")
    folder = values.get("output_directory")
    if folder and not Path(folder).is_dir():
        raise FlagError(f"--output_directory {folder}: no such directory")
    try:
        with tempfile.TemporaryFile(dir=folder or ".", prefix=".otil-xdit-") as probe:
            probe.write(bytes(PROBE_BYTES))
    except OSError as error:
        raise FlagError(
            f"--output_directory {folder or '.'}: images cannot be saved there ({error.strerror}); give another one"
        ) from error


@contextmanager
def silence() -> Iterator[None]:
    """Write no log lines up to warnings: the ranks, or the same checks with all flags, write them again."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        named = re.fullmatch(r"argument (\S+): expected one argument", message)
        action = self._option_string_actions.get(named[1]) if named else None
        raise FlagError(message if action is None or action.metavar is None else f"{message}; give {action.metavar}")


def _underscored(argument: str) -> str:
    """Return a flag as xDiT's parser takes it: with underscores in its name."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


@cache
def _names_in_xfuser(folder: str, pattern: str) -> frozenset[str]:
    """Return what `pattern` finds in the modules of a folder of xfuser, which is not imported."""
    spec = find_spec("xfuser")
    places = spec.submodule_search_locations if spec is not None else None
    texts = (path.read_text() for place in places or () for path in sorted(Path(place, folder).rglob("*.py")))
    return frozenset(
        name.replace("-", "_") if folder == "config" else name for text in texts for name in re.findall(pattern, text)
    )
