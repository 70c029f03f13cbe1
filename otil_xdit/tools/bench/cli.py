"""`otil-xdit bench`: milliseconds, waiting time and bytes of a step under each strategy, taking turns in one run."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from otil_xdit.catalog.folders import MODELS_HELP, OWN, find_model
from otil_xdit.catalog.schedulers import SCHEDULERS
from otil_xdit.runtime.strategies import get_strategy, strategies
from otil_xdit.tools.bench.link import LinkError, check_possible
from otil_xdit.tools.bench.plan import DEFAULT, PEERS, Plan, parse_strategy
from otil_xdit.tools.bench.report import plot, table
from otil_xdit.tools.bench.results import Results
from otil_xdit.tools.bench.runner import run_plan
from otil_xdit.tools.bench.scaling import plot_over_latents, plot_over_ranks
from otil_xdit.tools.common.figures import check_installed
from otil_xdit.tools.common.flags import FlagAdder
from otil_xdit.tools.common.jobs import Interrupted, JobFailed
from otil_xdit.tools.common.links import LinkRequest, parse_shaped_link

LINK_HELP = """\
limit what the ranks send each other, as root on Linux: RATE in each direction of each rank's cable (20MB/s, 1gbit),
or ratio=R: the rate at which the keys and values of a synchronous step take R times as long as a naive step computes.
What R stands for: SDXL at 1024 x 1024 on 2 patches, 16 bits, batch 2 (guidance), has 70 layers of self-attention: 10
of 4096 tokens of 640 numbers, 60 of 1024 tokens of 1280. A rank has half the tokens, so a step's keys and values are
2 x 2 x (10 x 2048 x 640 + 60 x 512 x 1280) x 2 bytes = 419 MB. R is 419 MB over what your link really moves in a
second (PCIe 4.0 x8 has 15.75 GB/s on paper, less through the host: measure it), over the seconds that a step computes
there. No delay is emulated."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags: what is compared, how often, and over which link."""
    add = FlagAdder(parser)
    plan = {name: field.default for name, field in Plan.__dataclass_fields__.items()}
    add("--models", MODELS_HELP, ["tiny-sd"], "MODEL")
    about = "all channels times N (a DiT: N times the heads), with random weights (default 1: the models as they are)"
    add("--width", about, plan["width"], "N")
    others = "; ".join(f"{name}: {about}" for name, about in PEERS.items())
    about = f"variants as eval's --presets take them, of {', '.join(strategies())}; or {others}"
    add("--strategies", about, list(DEFAULT), "NAME")
    add("--ranks", "numbers of ranks", [2], "N")
    add("--sizes", "height and width (default 128)", None, "PIXELS", nargs="+", type=int)
    add("--latent", "in place of --sizes: height and width of the latent", None, "N", nargs="+", type=int)
    add("--steps", "of an image", plan["steps"], "N")
    about = f"of U-Nets: {OWN}, {', '.join(SCHEDULERS)} (default dpm-solver); DiTs have their own"
    add("--sampler", about, plan["sampler"], "NAME")
    add("--guidance", "guidance scale", plan["guidance"], "G")
    add("--rounds", "images that count", plan["rounds"], "N")
    add("--warmup_rounds", "images before them that do not", plan["warmup_rounds"], "N")
    add("--link", LINK_HELP, None, "RATE")
    add("--limit", "give up when loading a strategy, or an image, takes longer", plan["limit"], "SECONDS")
    add("--out", "for all results", Path("bench-out"), "FOLDER")


def run(arguments: argparse.Namespace) -> int:
    """Measure, and write `bench.json`, `table.md`, `bench.png` and the ranks' logs.

    `ranks.png` and `latents.png` are written where there are several of them.

    Returns:
        1 where a rank or the link failed, 0 otherwise.

    Raises:
        ValueError: for arguments that cannot be run, before anything is started or written.
    """
    plan, link = read_plan(arguments), read_link(arguments)
    out: Path = arguments.out
    check_installed("the plot needs")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    results = Results(plan, shlex.join(["otil-xdit", *sys.argv[1:]]))
    try:
        run_plan(plan, link, out / "logs", results, lambda: write(results, out))
    except (JobFailed, LinkError, Interrupted) as error:
        print(f"otil-xdit bench: {error}", file=sys.stderr)
        return error.code
    print(table(results))
    return 0


def write(results: Results, out: Path) -> None:
    """Write all files of the folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(results.to_dict(), indent=1) + "\n")
    (out / "table.md").write_text(table(results))
    plot(results, out / "bench.png")
    plot_over_ranks(results, out / "ranks.png")
    plot_over_latents(results, out / "latents.png")


def read_plan(arguments: argparse.Namespace) -> Plan:
    """Return what the arguments ask for.

    Raises:
        ValueError: naming the flag, its value and what is accepted.
    """
    if arguments.sizes is not None and arguments.latent is not None:
        given = f"--sizes {' '.join(map(str, arguments.sizes))} and --latent {' '.join(map(str, arguments.latent))}"
        raise ValueError(f"{given} both say how large images are; give one of them")
    return Plan(
        models=tuple(find_model(name) for name in dict.fromkeys(arguments.models)),
        strategies=tuple(parse_strategy(text) for text in dict.fromkeys(arguments.strategies)),
        ranks=tuple(dict.fromkeys(arguments.ranks)),
        sizes=tuple(dict.fromkeys(arguments.sizes or (128,))),
        latents=tuple(dict.fromkeys(arguments.latent or ())),
        **{name: getattr(arguments, name) for name in _NUMBERS},
    )


_NUMBERS = ("width", "steps", "sampler", "guidance", "rounds", "warmup_rounds", "limit")
"""Arguments that are fields of `Plan` as they are."""


def read_link(arguments: argparse.Namespace) -> LinkRequest | None:
    """Return what ``--link`` asks for.

    Raises:
        ValueError: where it cannot be had.
    """
    if arguments.link is None:
        return None
    request = parse_shaped_link(arguments.link)
    several = sorted(set(arguments.ranks) - {1})
    if len(several) != 1:
        given = " ".join(map(str, arguments.ranks))
        raise ValueError(
            f"--link {request.text} with --ranks {given}: a link has one number of ranks; give one above 1"
        )
    if request.ratio is not None:
        for flag in ("models", "sizes", "latent"):
            if len(set(getattr(arguments, flag) or ())) > 1:
                raise ValueError(f"--link {request.text} with several --{flag}: each would have its own rate; give one")
        warmup = get_strategy("naive").make_config({}).warmup_steps
        if arguments.steps <= warmup:
            raise ValueError(f"--link {request.text} with --steps {arguments.steps}: give more than {warmup}")
    check_possible(request.text)
    return request
