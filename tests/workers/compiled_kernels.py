"""Compiles the fused kernels for real cards on a machine that needs none, and prints what each takes of one.

    python tests/workers/compiled_kernels.py [--cards 80 86 89 90 120]

Prints a JSON object for each kernel and card: registers, spilled bytes and shared memory, as ptxas reports them. Shapes
are those of SDXL (1280 features, 640 channels) and FLUX (3072 features).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from otil_xdit.method.kernels import (  # noqa: E402
    adaptive,
    adaptive_copies,
    bits,
    choices,
    copies,
    gathered,
    group_norm,
    joined_rows,
    moments,
    others,
    own,
    payloads,
    rows,
    vectors,
)
from otil_xdit.method.kernels.tiles import Tiles  # noqa: E402

CARDS = (80, 86, 89, 90, 120)

HALF, FLOAT, BYTES, INT, LONG = "*fp16", "*fp32", "*u8", "*i32", "*i64"

ALIGNED = {f"{of}_{step}" for of in ("key", "value") for step in ("image", "head", "token")} | {
    "whole_image",
    "tokens",
    "size",
    "rank_size",
}
"""Numbers that are multiples of 16 in these networks, as pointers are; Triton compiles a kernel of its own for them."""

Kernel = tuple[Any, dict[str, str], dict[str, Any], int]
"""A kernel, its arguments' types by name, its constants, and the warps that run it."""


def kernels(width: int) -> Iterator[Kernel]:
    """Yield every kernel, as the strategy otil launches it for so many features."""
    columns = triton.next_power_of_2(width)
    yield from of_coordinates(width)
    yield from of_adaptive(width, columns)
    yield (
        copies._mark_sent,
        {"received": BYTES, "table": LONG, "age": FLOAT, "slots": INT, "share": FLOAT}
        | dict.fromkeys(("layers", "size", "indices_at"), "i32"),
        {"TOKENS": 2048, "T": 16, "SENT": 1792, "BLOCK": 1024},
        4,
    )
    yield (
        copies._correct,
        {"value": HALF, "velocity": BYTES, "received": BYTES, "slots": INT, "share": FLOAT}
        | {"levels": FLOAT, "scales": FLOAT}
        | dict.fromkeys(("layers", "batch", "tokens", "size", "coded_at", "sent_tokens"), "i32")
        | {"constant": "fp32", "damping": "fp32"},
        {"C": width, "R": width // 4, "BITS": 2, "COLUMNS": 1024, "MOVES": True, "FITTED": True, "SELECTED": True},
        4,
    )
    for of_number in (1, 2, 4, 8):
        yield (
            payloads._encode,
            {"residuals": HALF, "gains": FLOAT, "fitted": FLOAT, "scales": FLOAT, "borders": FLOAT}
            | {"payload": BYTES, "selected": LONG, "table": LONG}
            | dict.fromkeys(("batch", "tokens", "size", "indices_at", "coded_at", "count"), "i32")
            | dict.fromkeys(("octave", "zero", "width_root", "step", "middle", "highest"), "fp32"),
            {"C": width, "T": 16, "BITS": of_number, "BYTES": columns * of_number // 8}
            | {"R": width * of_number // 8}
            | {"TRAVELS": True, "SELECTED": True},
            4,
        )
    yield (
        moments._correct_moments,
        dict.fromkeys(
            ("mean_now", "var_now", "share", "received", "before", "assumed", "sent", "mean_out", "var_out"), FLOAT
        )
        | {"own": "i32", "gain": "fp32"},
        {"R": 4, "B": 2, "G": 32, "EXTRAPOLATED": True, "WEIGHT": 2, "ROWS": 2, "COLS": 32},
        1,
    )
    steps = ("image", "channel", "row", "column")
    for last in (False, True):
        yield (
            rows._pad_rows,
            dict.fromkeys(("x", "out", "above", "above_before", "above_given"), HALF)
            | dict.fromkeys(("below", "below_before", "below_given"), HALF)
            | dict.fromkeys(("count", "channels", "height", "width", "above_height", "below_height"), "i32")
            | {f"{step}_step": "i32" for step in steps}
            | {f"{side}_{step}": "i32" for side in ("above", "below") for step in steps}
            | {"gain": "fp32"},
            {"LAST": last, "ABOVE": 1, "BELOW": 2, "KEPT": 0, "GIVEN": 1, "BLOCK": 512},
            4,
        )
        yield (
            group_norm._group_moments,
            {"x": HALF, "mean": FLOAT, "var": FLOAT, "pixels": "i32"},
            {"C": 640, "G": 32, "LAST": last, "BLOCK": 4096},
            8,
        )
        yield (
            group_norm._normalise,
            {"x": HALF, "mean": FLOAT, "var": FLOAT, "weight": HALF, "bias": HALF, "out": HALF}
            | {"count": "i32", "pixels": "i32", "eps": "fp32"},
            {"C": 640, "G": 32, "LAST": last, "AFFINE": True, "BLOCK": 1024},
            4,
        )
        yield (
            group_norm._activate_into,
            {"x": HALF, "mean": FLOAT, "var": FLOAT, "weight": HALF, "bias": HALF, "out": HALF, "eps": "fp32"}
            | dict.fromkeys(("count", "channels", "height", "width"), "i32")
            | {f"{step}_step": "i32" for step in steps}
            | {f"out_{step}": "i32" for step in steps},
            {"G": 32, "PER": 20, "LAST": last, "AFFINE": True, "BLOCK": 512},
            4,
        )
    yield (
        joined_rows._join_rows,
        dict.fromkeys(("top", "above", "above_before", "above_given"), HALF)
        | dict.fromkeys(("bottom", "below", "below_before", "below_given"), HALF)
        | dict.fromkeys(("above_count", "above_height", "below_count", "below_height", "channels", "width"), "i32")
        | {f"{step}_step": "i32" for step in steps}
        | {f"{side}_{step}": "i32" for side in ("above", "below") for step in steps}
        | {"gain": "fp32"},
        {"ABOVE": 1, "BELOW": 2, "KEPT": 0, "GIVEN": 1, "BLOCK": 256},
        4,
    )
    yield (
        group_norm._combine_moments,
        dict.fromkeys(("received", "share", "came", "mean", "var"), FLOAT) | {"other": "i32", "size": "i32"},
        {"R": 4, "CAME": True, "BLOCK": 64},
        4,
    )
    yield (
        rows._pack_rows,
        dict.fromkeys(("mean", "var", "kept", "sent"), FLOAT)
        | dict.fromkeys(("up", "to_previous", "down", "to_next"), HALF)
        | dict.fromkeys(("size", "up_count", "up_height", "down_count", "down_height", "channels", "width"), "i32")
        | {f"{step}_step": "i32" for step in steps},
        {"SIZE": 64, "SENDS": True, "BLOCK": 512},
        4,
    )

    coded = {"vectors": HALF, "scale_bytes": BYTES, "codes": BYTES, "scales": FLOAT, "count": "i32"}
    yield (
        vectors._encode_vectors,
        coded | dict.fromkeys(("octave", "zero", "step", "middle", "highest"), "fp32"),
        {"C": 64, "VECTORS": 16},
        4,
    )
    yield vectors._decode_vectors, coded | {"levels": FLOAT}, {"C": 64, "VECTORS": 16}, 4


def of_coordinates(width: int) -> Iterator[Kernel]:
    """Yield the kernels between keys and values and their coordinates: heads of 64 features, or of 128 for FLUX."""
    size = 64 if width < 2048 else 128
    constants = Tiles.of(2, 512).constants(width // size, size) | {"TURNS": True, "MOVES": True}
    for follows in (False, True):
        yield (
            own._take_own,
            dict.fromkeys(("key", "value", "copies", "whole", "taken"), HALF)
            | dict.fromkeys(("matrices", "expected", "gains", "trend", "sums", "totals", "numbers"), FLOAT)
            | {"sizes": FLOAT}
            | dict.fromkeys(("share", "scales"), FLOAT)
            | {"velocities": BYTES}
            | {"payload": BYTES, "words": INT, "slots": INT, "constant": "fp32", "damping": "fp32"}
            | {f"{of}_{step}": "i32" for of in ("key", "value") for step in ("image", "head", "token")}
            | dict.fromkeys(("whole_image", "batch", "tokens", "heads"), "i32")
            | dict.fromkeys(("sent", "scales_at", "codes_at", "key_row", "value_row"), "i32"),
            constants
            | dict.fromkeys(("COMPARES", "DIFFERS", "SIZES", "TRENDS", "ATTENDS"), True)
            | {"LARGEST": 1.25, "FOLLOWS": follows, "C": width, "FEATURES": 64}
            | {"WIDTH": 3 * size, "BITS_AT": 16, "SIZE_AT": 20, "FITTED": True, "SELECTED": True},
            4,
        )
    yield (
        others._write_others,
        {"copies": HALF, "velocities": BYTES, "matrices": FLOAT, "totals": FLOAT, "gains": FLOAT, "out": HALF}
        | dict.fromkeys(("batch", "tokens", "heads", "ranks", "own", "count"), "i32"),
        constants | {"FITTED": True, "LARGEST": 1.25, "PARTS": 512},
        4,
    )
    switches = dict.fromkeys(("KNOWN", "AGED"), True)
    yield (
        gathered._set_coded,
        {"value": HALF, "velocity": BYTES, "out": HALF}
        | dict.fromkeys(("age", "levels", "scales", "matrices"), FLOAT)
        | {"received": BYTES}
        | dict.fromkeys(("batch", "tokens", "size", "heads", "own"), "i32"),
        {"C": width, "R": width, "BITS": 8, "FEATURES": 64, "PARTS": 8, "WIDTH": 3 * size} | constants | switches,
        4,
    )
    yield (
        gathered._set_gathered,
        {"gathered": HALF, "value": HALF, "velocity": BYTES, "out": HALF}
        | dict.fromkeys(("age", "matrices"), FLOAT)
        | dict.fromkeys(("batch", "tokens", "heads", "ranks"), "i32"),
        constants | switches,
        4,
    )
    yield (
        choices._settle,
        dict.fromkeys(("sums", "totals", "gains", "fitted", "expected", "trend", "scores"), FLOAT)
        | {"table": LONG, "selected": LONG}
        | dict.fromkeys(("parts", "tokens", "images", "count", "blocks", "sent"), "i32"),
        {"T": 4, "SIDE": 4, "BLOCKS": 1024, "STEP": 256, "LARGEST": 1.25, "PARTS": 512, "BINS": 512}
        | {"SHARE": 0.6, "FADING": 0.8}
        | dict.fromkeys(("FITTED", "TRENDS", "SCORES", "PICKS"), True),
        8,
    )


def of_adaptive(width: int, columns: int) -> Iterator[Kernel]:
    """Yield the adaptive codec's kernels."""
    given = {"residuals": HALF, "gains": FLOAT, "fitted": FLOAT, "payload": BYTES, "selected": LONG}
    sizes = dict.fromkeys(("batch", "tokens", "size", "sent", "count"), "i32")
    places = dict.fromkeys(("codes_at", "scales_at", "key_row", "value_row"), "i32")
    word = {"BITS_AT": 16, "SIZE_AT": 20}
    coded = {"FITTED": True, "SELECTED": True}
    yield (
        adaptive._measure_features,
        {"sizes": FLOAT, "payload": BYTES}
        | dict.fromkeys(("batch", "tiles", "size", "sizes_at"), "i32")
        | dict.fromkeys(("octave", "zero", "root"), "fp32"),
        {"C": width, "FEATURES": 32, "ROWS": 64},
        4,
    )
    yield (
        adaptive._encode_adaptive,
        given
        | {"table": LONG, "words": INT, "entries": INT, "scales": FLOAT, "indices_at": "i32"}
        | sizes
        | places
        | {"octave": "fp32", "zero": "fp32"},
        {"C": width, "COLUMNS": 512, "ROW": width // 4, "BYTES": 64, "VECTORS": 4, "T": 4}
        | word
        | {"TRAVELS": True, "SELECTED": True},
        4,
    )
    tiles, size = Tiles.of(2, 512), 64 if width < 2048 else 128
    whole = {"FEATURES": 64, "TOKENS": tiles.rows, "PARTS": tiles.parts, "WIDTH": 3 * size, "WRITES": True}
    for part in (
        {"FEATURES": 256, "TOKENS": 4, "PARTS": 1, "WIDTH": width, "WRITES": False, "PREDICTS": False, "WHOSE": 0},
        {**whole, "PREDICTS": False, "WHOSE": 2},
        {**whole, "PREDICTS": True, "WHOSE": 2},
    ):
        yield (
            adaptive_copies._advance_adaptive,
            {"value": HALF, "velocity": BYTES, "received": BYTES, "slots": INT, "share": FLOAT, "words": INT}
            | dict.fromkeys(("scales", "totals", "gains", "matrices"), FLOAT)
            | {"out": HALF, "constant": "fp32", "damping": "fp32"}
            | dict.fromkeys(("ranks", "layers", "batch", "tokens", "size", "rank_size", "sent"), "i32")
            | dict.fromkeys(("heads", "own", "count"), "i32")
            | places,
            {"C": width, "TURNS": True, "LARGEST": 1.25, "SUMS": 512}
            | part
            | word
            | coded
            | {"MOVES": True}
            | tiles.constants(width // size, size),
            4,
        )
    for entries in (True, False):
        yield (
            bits._read_plans,
            {"payloads": BYTES, "words": INT, "entries": INT, "table": LONG, "age": FLOAT, "slots": INT, "share": FLOAT}
            | dict.fromkeys(("layers", "ranks", "size", "sizes_at", "key_budget", "value_budget", "indices_at"), "i32"),
            {"C": width, "FEATURES": columns, "ROW": 2 * width, "G1": -2, "G2": -6, "G4": -13, "G8": -26}
            | {"LEVELS": 512, "ENTRIES": entries, "TOKENS": 2048, "T": 4, "SENT": 1792, "BLOCK": 1024}
            | word,
            8 if columns > 2048 else 4,
        )


def compiled(kernel: Kernel, card: int) -> dict[str, Any]:
    """Return what ptxas says of a kernel for a card."""
    function, types, constants, warps = kernel
    signature = types | dict.fromkeys(constants, "constexpr")
    aligned = [name for name, kind in types.items() if kind.startswith("*") or name in ALIGNED]
    divisible = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=divisible)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", card, 32),
        options={"num_warps": warps, "num_stages": 1 if "TURNS" in constants else 3},
    )
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(made.asm["ptx"])
        target = re.search(r"\.target (sm_\w+)", made.asm["ptx"])
        assert target is not None, "PTX names its target"
        command = [get_ptxas(card).path, "-v", f"--gpu-name={target[1]}", str(ptx), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, stores, loads = (
        re.search(pattern, said)
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill st", r"(\d+) bytes spill l")
    )
    assert registers and stores and loads, said
    return {
        "kernel": function.__name__,
        "card": f"sm_{card}",
        "constants": {name: value for name, value in constants.items() if name in ("C", "BITS", "LAST", "FOLLOWS")},
        "registers": int(registers[1]),
        "spilled": int(stores[1]) + int(loads[1]),
        "shared": made.metadata.shared,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cards", nargs="+", type=int, default=list(CARDS))
    parser.add_argument("--widths", nargs="+", type=int, default=[1280, 3072])
    arguments = parser.parse_args()
    for card in arguments.cards:
        for width in arguments.widths:
            for kernel in kernels(width):
                print(json.dumps(compiled(kernel, card)), flush=True)


if __name__ == "__main__":
    main()
