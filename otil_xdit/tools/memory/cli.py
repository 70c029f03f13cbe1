"""`otil-xdit memory`: how much memory the exchange's copies take on a rank, found without weights and without ranks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import get_args

import torch

from otil_xdit.catalog.models import published_networks
from otil_xdit.dryrun.memory import Memory, memory_of
from otil_xdit.dryrun.networks import DTYPES, Network, attention_layers, find_network
from otil_xdit.method.config import KvCacheDtype, OtilConfig
from otil_xdit.runtime.strategies import get_strategy
from otil_xdit.tools.common.tables import markdown
from otil_xdit.xdit.flags.degrees import check_at_least

TITLES = ("model", "ranks", "preset", "largest layer", "all layers", "values", "velocities", "payloads", "in turn")
"""The last one is what all layers use in turn, besides what they keep."""

MEGABYTE = 10**6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which networks, how large an image, on how many ranks, and how copies are kept."""
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        default=["SDXL", "FLUX"],
        metavar="MODEL",
        help=f"{', '.join(published_networks())}, shipped models, or folders in diffusers format (default SDXL FLUX)",
    )
    add("--size", type=int, default=1024, metavar="PIXELS", help="height and width (default 1024)")
    add("--ranks", type=int, nargs="+", default=[2, 4, 8], metavar="N", help="numbers of patches (default 2 4 8)")
    add("--batch", type=int, metavar="B", help="images in one pass (default 2, with and without the prompt; FLUX 1)")
    add("--text_tokens", type=int, default=512, metavar="N", help="of a DiT (default 512, as FLUX has)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the network (default bfloat16)")
    add(
        "--kv_cache_dtype",
        nargs="+",
        choices=get_args(KvCacheDtype),
        default=list(get_args(KvCacheDtype)),
        help="as --otil_kv_cache_dtype, each a row of the preset otil (default all)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        ValueError: for arguments that no run could have.
    """
    for ranks in arguments.ranks:
        check_at_least("ranks", ranks, 2)
    if arguments.batch is not None:
        check_at_least("batch", arguments.batch, 1)
    check_at_least("text_tokens", arguments.text_tokens, 1)
    rows = [row for name in arguments.models for row in rows_of(find_network(name), arguments)]
    print(f"{arguments.size} x {arguments.size} pixels, {arguments.dtype}. MB (10^6 bytes) on each rank:\n")
    print(markdown(TITLES, rows, text=3))


def presets(dtypes: list[str]) -> dict[str, OtilConfig]:
    """The settings to compare, by the name in the table."""
    found = {"distrifusion": get_strategy("distrifusion").make_config({})}
    for dtype in dtypes:
        found[f"otil, {dtype}"] = get_strategy("otil").make_config({"kv_cache_dtype": dtype})
    return found


def rows_of(network: Network, arguments: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """A row for each number of ranks and preset."""
    batch, dtype = arguments.batch or network.batch, getattr(torch, arguments.dtype)
    for ranks in arguments.ranks:
        layers = attention_layers(network, arguments.size, ranks, arguments.text_tokens)
        for name, config in presets(arguments.kv_cache_dtype).items():
            yield network.name, str(ranks), name, *cells(memory_of(layers, ranks, batch, dtype, config))


def cells(memory: Memory) -> tuple[str, ...]:
    """The figures of a row, in the order of `TITLES`."""
    figures = (memory.largest, memory.total, memory.values, memory.velocities, memory.buffers)
    return tuple(f"{figure / MEGABYTE:.1f}" for figure in (*figures, sum(memory.scratch.values())))
