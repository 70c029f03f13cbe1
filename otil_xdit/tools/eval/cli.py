"""`otil-xdit eval`: a matrix of models, variants, ranks and samplers: how close to one process, at how many bytes."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch

from otil_xdit.catalog.folders import MODELS_AND_VIDEOS_HELP, OWN, Model, find_model
from otil_xdit.catalog.schedulers import SCHEDULERS
from otil_xdit.catalog.trust import check_folder, check_lora
from otil_xdit.runtime.strategies import strategies
from otil_xdit.tools.common.flags import DTYPES, FlagAdder
from otil_xdit.tools.common.jobs import Interrupted, jobs_of_a_run
from otil_xdit.tools.common.variants import parse_variant, variant_settings
from otil_xdit.tools.eval.attention_observer import Drawing, write_statistics
from otil_xdit.tools.eval.cache import ImageCache
from otil_xdit.tools.eval.contact_sheets import write_sheets
from otil_xdit.tools.eval.equivalents import CHANGES, parse_equivalent
from otil_xdit.tools.eval.generate import Failures, ImageMaker
from otil_xdit.tools.eval.matrix import (
    PROMPTS,
    VIDEO_PROMPTS,
    Case,
    Matrix,
    make_calls,
    parse_sampler,
    read_prompts,
)
from otil_xdit.tools.eval.perceptual_metrics import absences
from otil_xdit.tools.eval.report import plot, table
from otil_xdit.tools.eval.rows import as_json, make_rows
from otil_xdit.xdit.flags.degrees import check_at_least
from otil_xdit.xdit.launcher.processes import caught_signals, visible_devices

EXTRAS = {"torchmetrics": "torchmetrics", "PIL": "pillow", "matplotlib": "matplotlib"}
"""Modules that are not among the plugin's own dependencies, and their packages."""

DEFAULT_SIZE, DEFAULT_CLIP_SIZE = 128, 64
"""Height and width of an image, and of a clip, which the bundled models were trained for."""

DEFAULT_FRAMES = 9
"""Of a clip, likewise."""

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags: the matrix, the images, and how they are made."""
    add = FlagAdder(parser)
    add("--models", MODELS_AND_VIDEOS_HELP, ["tiny-sd"], "MODEL")
    about = f"presets are {', '.join(strategies())}; settings are {', '.join(variant_settings())}"
    about = f"variants, say otil:ratio=1/4,select=kv-l2; {about}"
    add("--presets", about, ["distrifusion", "otil", "naive"], "PRESET[:SETTING=VALUE,...]")
    add("--ranks", "numbers of ranks: of patches, or with --use_cfg_parallel twice as many", [2], "N")
    parser.add_argument(
        "--use_cfg_parallel",
        action="store_true",
        help="compute the passes with and without the prompt on different halves of the ranks",
    )
    about = f"{OWN} (the model's), {', '.join(SCHEDULERS)}; DiTs have only their own and skip the others"
    add("--samplers", about, ["dpm-solver:15"], "NAME:STEPS")
    add("--prompts", "take the first N prompts", 2, "N")
    add("--prompt_file", "a prompt a line, in place of the eight that ship", None, "FILE", type=Path)
    add("--seeds", "images of each prompt, seeds 0 to N - 1", 1, "N")
    add("--guidance", "guidance scale", 4.0, "G")
    about = "height and width (default 128, of clips 64; with --stats the pipeline's own)"
    add("--size", about, None, "PIXELS", type=int)
    add("--frames", "of a clip, with models that draw clips (default 9)", None, "N", type=int)
    about = "of weights and images; 16 bits bring a row of what the order of sums leaves undecided (default float32)"
    add("--dtype", about, "float32", choices=DTYPES)
    about = "LoRA weights: a file, or a folder with one .safetensors; one model only; fused into a DiT"
    add("--lora", about, None, "PATH")
    about = f"{', '.join(CHANGES)}, each with a number, say outliers:32"
    about = f"make the rows of an equivalent network too, which draws the same; repeatable; {about}"
    add("--variant", about, None, "NAME", action="append")
    about = (
        "instead of all this, draw one image with the pipeline of each folder in this process and say how uneven its "
        "keys and values are, and those of each --variant of it; takes the first of --samplers, --prompts and --dtype"
    )
    add("--stats", about, None, "FOLDER", nargs="+")
    add("--out", "for all results", Path("eval-out"), "FOLDER")
    add("--sheet_rows", "images of a case on its contact sheet", 4, "N")
    add("--timeout", "give a case up when no image is finished for so long", 600.0, "SECONDS")
    about = "processes that make one process's images, each alone (default 2, where there are as many cores)"
    add("--jobs", about, min(2, os.cpu_count() or 1), "N")
    parser.add_argument(
        "--fresh", action="store_true", help="make all images again; otherwise what the folder has is used"
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would be made, and stop")


def run(arguments: argparse.Namespace) -> int:
    """Make what is missing, and write `rows.json`, `table.md`, `psnr_bytes.png` and contact sheets.

    Returns:
        1 where a case failed, 0 otherwise.

    Raises:
        ValueError: for arguments that cannot be run, before anything is started or written.
    """
    if arguments.stats:
        print(measure_statistics(arguments))
        return 0
    _check_numbers(arguments)
    matrix = read_matrix(arguments)
    missing = [package for module, package in EXTRAS.items() if find_spec(module) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not installed; pip install 'otil-xdit[metrics,bench]'")
    if arguments.dry_run:
        print(describe(matrix))
        return 0
    cache = ImageCache(arguments.out / "cache", matrix)
    if arguments.fresh:
        for case in all_cases(matrix):
            cache.forget(case)
    try:
        with caught_signals() as caught, jobs_of_a_run(arguments.out / "logs", arguments.timeout, caught) as jobs:
            failures = ImageMaker(matrix, cache, jobs).make(arguments.jobs)
    except Interrupted as error:
        print(f"otil-xdit eval: {error}", file=sys.stderr)
        return error.code
    write(arguments, matrix, cache, failures)
    return 1 if failures else 0


def write(arguments: argparse.Namespace, matrix: Matrix, cache: ImageCache, failures: Failures) -> None:
    """Write all files of the folder, and the table on stdout."""
    out, command = arguments.out, command_of(arguments, matrix.size)
    by_case = make_rows(matrix, cache, failures)
    rows = list(by_case.values())
    (out / "rows.json").write_text(json.dumps(as_json(rows, command), indent=1) + "\n")
    text = table(rows, command, absences(len(matrix.calls)))
    (out / "table.md").write_text(text)
    plot(rows, out / "psnr_bytes.png")
    write_sheets(out, matrix, cache, by_case, arguments.sheet_rows)
    print(text)


def read_matrix(arguments: argparse.Namespace) -> Matrix:
    """Return what the arguments ask for.

    Raises:
        ValueError: naming the flag, its value and what is accepted.
    """
    models = _each(_trusted_model, arguments.models)
    videos = any(model.frames for model in models)
    if arguments.frames is not None and not videos:
        raise ValueError(f"--frames {arguments.frames}: {models[0].name} draws images; leave it out")
    prompts = arguments.prompt_file or (VIDEO_PROMPTS if videos else PROMPTS)
    return Matrix(
        models=models,
        variants=_each(parse_variant, arguments.presets),
        ranks=tuple(dict.fromkeys(arguments.ranks)),
        samplers=_each(parse_sampler, arguments.samplers),
        calls=make_calls(read_prompts(prompts), arguments.prompts, arguments.seeds),
        guidance=arguments.guidance,
        size=arguments.size or (DEFAULT_CLIP_SIZE if videos else DEFAULT_SIZE),
        frames=DEFAULT_FRAMES if arguments.frames is None else arguments.frames,
        equivalents=(None, *_each(parse_equivalent, arguments.variant or [])),
        lora=None if arguments.lora is None else str(lora_file(Path(arguments.lora))),
        cfg_parallel=arguments.use_cfg_parallel,
        dtype=getattr(torch, arguments.dtype),
    )


def measure_statistics(arguments: argparse.Namespace) -> str:
    """Write `stats.json`, and return its tables.

    Raises:
        ValueError: naming the flag, its value and what is accepted.
    """
    sampler, prompts = parse_sampler(arguments.samplers[0]), read_prompts(arguments.prompt_file or PROMPTS)
    (call,) = make_calls(prompts, 1, 1)
    dtype = getattr(torch, arguments.dtype)
    drawing = Drawing(call.prompt, sampler.name, sampler.steps, arguments.size, arguments.guidance, dtype)
    equivalents = (None, *_each(parse_equivalent, arguments.variant or []))
    return write_statistics(arguments.stats, equivalents, drawing, arguments.out / "stats.json")


def _each(parse: Callable[[str], T], texts: Iterable[str]) -> tuple[T, ...]:
    """Return each text once, parsed."""
    return tuple(parse(text) for text in dict.fromkeys(texts))


def _trusted_model(name: str) -> Model:
    """Return a model whose files run no code."""
    model = find_model(name, videos=True)
    check_folder(model.folder)
    return model


def lora_file(path: Path) -> Path:
    """Return the file of LoRA weights that a path names.

    Raises:
        ValueError: for a path that is neither a file nor a folder with one ``.safetensors``, a file that can run code,
            or without peft.
    """
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(found) != 1 or not found[0].is_file():
        raise ValueError(f"--lora {path}: give a file of LoRA weights, or a folder with one .safetensors file")
    check_lora(str(found[0]))
    if find_spec("peft") is None:
        raise ValueError(f"--lora {path}: peft is not installed; pip install peft")
    return found[0].resolve()


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name in ("sheet_rows", "jobs"):
        check_at_least(name, getattr(arguments, name), 1)
    if not arguments.timeout > 0:
        raise ValueError(f"--timeout {arguments.timeout:g}: give a number of seconds above 0")
    devices = visible_devices()
    for ranks in arguments.ranks:
        if ranks < 2:
            raise ValueError(f"--ranks {ranks}: give 2 or more; one process is what all are compared with")
        if devices and ranks > devices:
            raise ValueError(f"--ranks {ranks}: {ranks} ranks need as many devices, and {devices} are visible")


def all_cases(matrix: Matrix) -> list[Case]:
    """Return all cases, those of one process first."""
    alone = [*matrix.references, *matrix.floors(1)]
    return [*alone, *(case for ranks in matrix.ranks for case in matrix.cases(ranks))]


def describe(matrix: Matrix) -> str:
    """Return one line for each case, and the number of images."""
    cases = all_cases(matrix)
    lines = [f"{case}: {len(matrix.calls)}" for case in cases]
    return "\n".join([*lines, f"{len(cases)} cases, {len(cases) * len(matrix.calls)} images"])


def command_of(arguments: argparse.Namespace, size: int) -> str:
    """Return a command line that makes the same, `size` named."""
    words = ["otil-xdit", "eval"]
    for name in ("models", "presets", "ranks", "samplers"):
        words += [f"--{name}", *map(str, getattr(arguments, name))]
    words += [word for text in arguments.variant or [] for word in ("--variant", text)]
    words += ["--use_cfg_parallel"] if arguments.use_cfg_parallel else []
    for name in ("prompts", "prompt_file", "seeds", "guidance", "size", "frames", "dtype", "lora"):
        value = size if name == "size" else getattr(arguments, name)
        words += [] if value is None else [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)
