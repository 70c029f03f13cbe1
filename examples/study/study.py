"""The paper's selection study: does change of the latent tell change of the image? (docs/results/selection-study.md)

    python examples/study/study.py --seeds 2 --out study-out

Writes `study.json`, `table.md` and two figures to the folder.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from report import tables, write_report
from selection import METRICS, Settings, run_study
from trajectories import SAMPLERS

from otil_xdit import __version__
from otil_xdit.method.checks import parse_ratio


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study, write its files and print its tables; a wrong flag is one line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    try:
        run(parser.parse_args(arguments))
    except ValueError as error:
        parser.error(str(error))
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags; their defaults are those of `Settings`."""
    default = Settings()

    def add(flag: str, about: str, **how: Any) -> None:
        parser.add_argument(flag, help=f"{about} (default: %(default)s)", **how)

    many: dict[str, Any] = {"nargs": "+"}
    add("--models", "shipped models, or folders in diffusers format", **many, default=list(default.models))
    add("--sampler", f"for U-Nets: {', '.join(SAMPLERS)}; a DiT has its own", default=default.sampler)
    add("--steps", "denoising steps", type=int, default=default.steps)
    add("--prompts", "how many", type=int, default=default.prompts)
    add("--seeds", "images for each prompt", type=int, default=default.seeds)
    add("--guidance", "scale of classifier-free guidance", type=float, default=default.guidance)
    add("--size", "pixels a side", type=int, default=default.size)
    add("--blocks", "sides of a region, latent pixels", type=int, **many, default=list(default.blocks))
    add("--ratios", "shares of the regions to be found", **many, default=["1/2", "1/4", "1/8"])
    add("--metrics", f"of {', '.join(METRICS)}", **many, default=list(default.metrics))
    add("--out", "folder for study.json, table.md, study.png, study-steps.png", type=Path, default=Path("study-out"))


def run(arguments: argparse.Namespace) -> None:
    """Run the study, write its files, print its tables."""
    settings = read_settings(arguments)
    settings.check()
    if find_spec("matplotlib") is None:
        raise ValueError("the figures need matplotlib; pip install 'otil-xdit[bench]'")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out {arguments.out} is a file; give a folder")
    for note in settings.notes():
        _say(note)
    rows = run_study(settings, _say)
    command = shlex.join(["python", *sys.argv])
    versions = {"otil-xdit": __version__, **{name: version(name) for name in ("torch", "diffusers")}}
    write_report(arguments.out, settings, rows, command, versions)
    print(tables(settings, rows))
    print(f"Written to {arguments.out}: study.json, table.md, study.png, study-steps.png")


def read_settings(arguments: argparse.Namespace) -> Settings:
    """The flags as `Settings`; raises `ValueError` for what is not a ratio."""
    named: dict[str, Any] = {
        name: value for name, value in vars(arguments).items() if name in Settings.__dataclass_fields__
    }
    named["ratios"] = [parse_ratio(text) for text in arguments.ratios]
    frozen: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}
    return Settings(**frozen)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
