"""`otil-xdit plan`: bytes, memory and time of each strategy for a model, a size and a link, and which one to take."""

from __future__ import annotations

import argparse

from otil_xdit.catalog.models import published_networks
from otil_xdit.tools.common.cards import CARDS
from otil_xdit.tools.common.flags import DTYPES, FlagAdder
from otil_xdit.tools.common.links import LINKS
from otil_xdit.tools.plan.arguments import check_arguments
from otil_xdit.xdit.flags.options import parse_shares_or_auto
from otil_xdit.xdit.flags.parsing import typed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags: what is made, on what, and what is known of the machine."""
    add = FlagAdder(parser)
    add("--model", f"{', '.join(published_networks())}, a shipped model, or a folder in diffusers format")
    add("--size", "height and width (default 1024)", None, "PIXELS", type=int)
    add("--height", "in place of --size", None, "PIXELS", type=int)
    add("--width", "in place of --size", None, "PIXELS", type=int)
    add("--gpus", "number of ranks, from 2 up", None, "N", type=int)
    add("--link", f"{', '.join(LINKS)}, or RATE[,LATENCY] such as 12GB/s,20us", None, "LINK")
    add("--dtype", "of the network", "bfloat16", choices=DTYPES)
    add("--controlnets", "ControlNets of a U-Net, each a copy of its encoder", 0, "N")
    add("--images", "images of one call", 1, "N")
    parser.add_argument(
        "--no_guidance", action="store_true", help="one pass a step, without the one without the prompt"
    )
    add("--text_tokens", "of a pass (default: what the model's pipeline has)", None, "N", type=int)
    add("--steps", "denoising steps", 15, "N")
    add("--step_time", "of one step on one process, measured", None, "SECONDS", type=float)
    add("--flops", "operations a second that one process reaches, such as 60e12", None, "RATE", type=float)
    about = (
        f"{', '.join(CARDS)}: one's data sheet gives --flops, and launches and memory are counted; of unequal cards "
        "one for each rank, such as 4090,3090"
    )
    add("--card", about, None, "NAME,...")
    add("--cfg_degree", "ranks for the two passes of guidance (default: what is fastest)", type=int, choices=(1, 2))
    add("--ulysses_degree", "ranks that share attention heads (default: what is fastest)", None, "N", type=int)
    add(
        "--patch_shares",
        "of the patches, such as 3,2, taken for the cards' speeds unless --card names unequal ones, for which auto "
        "finds them; times are then those with --step_time or --flops of the fastest card",
        None,
        "N,N,...|auto",
        type=typed(parse_shares_or_auto),
    )
    about = "recommend the fastest whose images are at least as near one process's: a strategy, or decibels"
    add("--near", about, "distrifusion", "HOW")
    add("--machine", "terms of the machine, as --fit writes them; its link unless --link is given", None, "FILE")
    add("--fit", "find a machine's terms from runs of `otil-xdit bench --json`", None, "BENCH", nargs="+")
    add("--out", "where --fit writes them", None, "FILE")
    add("--check", "predict other runs with --machine, beside what was measured", None, "BENCH", nargs="+")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Print the tables and the advice; see `otil_xdit.tools.plan.report`.

    Raises:
        ValueError: for arguments that no run could have, and where a prediction lacks what it needs.
    """
    if not (arguments.fit or arguments.check):
        check_arguments(arguments)
    from otil_xdit.tools.plan import report  # imports diffusers, which takes seconds

    report.run(arguments)
