"""`otil-xdit memory`: how much memory the exchange's copies and the VAE take on a rank, without weights or ranks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import get_args

import torch

from otil_xdit.catalog.models import published_networks
from otil_xdit.dryrun.communicators import CHANNELS, COMMUNICATOR_BYTES, CONNECTIONS, communicators_of
from otil_xdit.dryrun.job import ParallelDegrees
from otil_xdit.dryrun.memory import Memory, memory_of
from otil_xdit.dryrun.networks import Network, attention_layers, find_network, with_controlnets
from otil_xdit.dryrun.vae_memory import PUBLISHED_VAES, peak_of_decoding
from otil_xdit.method.config import KvCacheDtype, OtilConfig
from otil_xdit.networks.dit.token_cut import TokenCut
from otil_xdit.runtime.strategies import get_strategy
from otil_xdit.tools.common.flags import DTYPES, FlagAdder
from otil_xdit.tools.common.tables import markdown
from otil_xdit.xdit.flags.degrees import check_at_least

TITLES = ("model", "ranks", "preset", "largest layer", "all layers", "values", "velocities", "payloads", "in turn")
"""The last one is what all layers use in turn, besides what they keep."""

MEGABYTE = 10**6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags: which networks, how large an image, on how many ranks, and how copies are kept."""
    add = FlagAdder(parser)
    about = f"{', '.join(published_networks())}, shipped models, or folders in diffusers format"
    add("--models", about, ["SDXL", "FLUX"], "MODEL")
    add("--size", "height and width", 1024, "PIXELS")
    add("--ranks", "numbers of patches", [2, 4, 8], "N")
    add("--batch", "images in one pass (default 2, with and without the prompt; FLUX 1)", None, "B", type=int)
    add("--controlnets", "ControlNets of a U-Net, each a copy of its encoder", 0, "N")
    add("--text_tokens", "of a DiT (default 512, as FLUX has)", 512, "N")
    add("--dtype", "of the network", "bfloat16", choices=DTYPES)
    add("--vaes", "whose VAE decodes; SD1.5 and SD2 have SDXL's", ["SDXL"], choices=[*PUBLISHED_VAES])
    dtypes = get_args(KvCacheDtype)
    about = "as --otil_kv_cache_dtype, each a row of the preset otil (default all)"
    add("--kv_cache_dtype", about, list(dtypes), choices=dtypes)


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
    networks = [with_controlnets(find_network(name), arguments.controlnets) for name in arguments.models]
    rows = [row for network in networks for row in rows_of(network, arguments)]
    print(f"{arguments.size} x {arguments.size} pixels, {arguments.dtype}. MB (10^6 bytes) on each rank:\n")
    print(markdown(TITLES, rows, text=3))
    dtype = getattr(torch, arguments.dtype)
    vaes = {name: PUBLISHED_VAES[name] for name in arguments.vaes}
    decodes = [
        (
            str(ranks),
            *(f"{peak_of_decoding(vae, arguments.size, ranks, dtype) / MEGABYTE:.0f}" for vae in vaes.values()),
        )
        for ranks in (1, *arguments.ranks)
    ]
    print("\nA VAE decoding: MB of activations that a rank holds at most:\n")
    print(markdown(("ranks", *(f"{name}, {vae.decodes}" for name, vae in vaes.items())), decodes, text=1))
    print(
        f"\nNCCL's communicators: about {COMMUNICATOR_BYTES / MEGABYTE:.0f} MB each on PCIe (an estimate: {CHANNELS} "
        f"channels of {CONNECTIONS} connections), made when first used:\n"
    )
    print(markdown(("ranks", "communicators", "MB"), list(communicator_rows()), text=2))


def communicator_rows() -> Iterator[tuple[str, ...]]:
    """Yield a row for each way to share an image that has communicators of its own."""
    for degrees in (ParallelDegrees(patches=2), ParallelDegrees(cfg=2, patches=2), ParallelDegrees(1, 2, 2)):
        named = communicators_of(degrees)
        yield str(degrees), "; ".join(named), f"{len(named) * COMMUNICATOR_BYTES / MEGABYTE:.0f}"


def presets(dtypes: list[str]) -> dict[str, OtilConfig]:
    """Return the settings to compare, by the name in the table."""
    found = {"distrifusion": get_strategy("distrifusion").make_config({})}
    for dtype in dtypes:
        found[f"otil, {dtype}"] = get_strategy("otil").make_config({"kv_cache_dtype": dtype})
    return found


def rows_of(network: Network, arguments: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Yield a row for each number of ranks and preset."""
    batch, dtype = arguments.batch or network.batch, getattr(torch, arguments.dtype)
    for ranks in arguments.ranks:
        layers = attention_layers(network, arguments.size, arguments.size, TokenCut(ranks), arguments.text_tokens)
        for name, config in presets(arguments.kv_cache_dtype).items():
            yield network.name, str(ranks), name, *cells(memory_of(layers, ranks, batch, dtype, config))


def cells(memory: Memory) -> tuple[str, ...]:
    """Return the figures of a row in MB, in the order of `TITLES`."""
    figures = (memory.largest, memory.total, memory.values, memory.velocities, memory.buffers)
    return tuple(f"{figure / MEGABYTE:.1f}" for figure in (*figures, sum(memory.scratch.values())))
