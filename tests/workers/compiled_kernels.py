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

from otil_xdit.method.kernels import copies, group_norm, moments, payloads  # noqa: E402

CARDS = (80, 86, 89, 90, 120)

HALF, FLOAT, BYTES, INT, LONG = "*fp16", "*fp32", "*u8", "*i32", "*i64"

Kernel = tuple[Any, dict[str, str], dict[str, Any], int]
"""A kernel, its arguments' types by name, its constants, and the warps that run it."""


def kernels(width: int) -> Iterator[Kernel]:
    """Yield every kernel, as the strategy otil launches it for so many features."""
    columns = triton.next_power_of_2(width)
    own = {"value": HALF, "velocity": HALF, "fresh": HALF, "gains": FLOAT}
    yield (
        copies._mark_sent,
        {"received": BYTES, "table": LONG, "age": FLOAT, "slots": INT, "share": FLOAT}
        | dict.fromkeys(("layers", "size", "indices_at"), "i32"),
        {"TOKENS": 2048, "T": 16, "SENT": 1792, "BLOCK": 1024},
        4,
    )
    yield (
        copies._correct,
        {"value": HALF, "velocity": HALF, "received": BYTES, "slots": INT, "share": FLOAT}
        | {"levels": FLOAT, "scales": FLOAT}
        | dict.fromkeys(("layers", "batch", "tokens", "size", "coded_at", "sent_tokens"), "i32")
        | {"constant": "fp32", "damping": "fp32"},
        {"C": width, "R": width // 4, "BITS": 2, "COLUMNS": 1024, "MOVES": True, "FITTED": True, "SELECTED": True},
        4,
    )
    yield (
        copies._predict,
        {"value": HALF, "velocity": HALF, "gain": FLOAT, "fresh": HALF, "out": HALF}
        | dict.fromkeys(("batch", "tokens", "own"), "i32"),
        {"C": width, "COLUMNS": 1024, "MOVES": True},
        4,
    )
    yield (
        copies._sum_moves,
        {"fresh": HALF, "value": HALF, "velocity": HALF, "partial": FLOAT, "count": "i32"},
        {"BLOCK": 1024},
        4,
    )
    yield copies._finish_gain, {"partial": FLOAT, "gain": FLOAT}, {"LARGEST": 1.25, "PARTS": 64}, 4
    yield (
        payloads._token_changes,
        own | {"changes": FLOAT} | dict.fromkeys(("layer_stride", "batch", "tokens"), "i32"),
        {"C": width, "COLUMNS": columns, "MOVES": True},
        4,
    )
    yield (
        payloads._block_changes,
        {"changes": FLOAT, "table": LONG, "out": FLOAT, "parts": "i32", "tokens": "i32"},
        {"T": 16, "SIDE": 16},
        4,
    )
    for bits in (1, 2, 4, 8):
        yield (
            payloads._encode,
            own
            | {"payload": BYTES, "selected": LONG, "table": LONG, "scales": FLOAT, "borders": FLOAT}
            | dict.fromkeys(("layer_stride", "batch", "tokens", "size", "indices_at", "coded_at", "count"), "i32")
            | dict.fromkeys(("octave", "zero", "width_root", "step", "middle", "highest"), "fp32"),
            {"C": width, "T": 16, "BITS": bits, "BYTES": columns * bits // 8, "R": width * bits // 8}
            | {"MOVES": True, "FITTED": True, "SELECTED": True},
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
    for last in (False, True):
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
        group_norm._combine_moments,
        {"received": FLOAT, "share": FLOAT, "mean": FLOAT, "var": FLOAT, "SIZE": "i32"},
        {"R": 4, "BLOCK": 64},
        4,
    )


def compiled(kernel: Kernel, card: int) -> dict[str, Any]:
    """Return what ptxas says of a kernel for a card."""
    function, types, constants, warps = kernel
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": warps})
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
        "constants": {name: value for name, value in constants.items() if name in ("C", "BITS", "LAST")},
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
