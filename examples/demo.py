"""The demo: one prompt on one process, and on two with each strategy, through the same command that users type.

Prints the bytes that each strategy sends, how close its picture is to one process's, and the time; writes the pictures
side by side. Every run is a fresh `xfuser --model tiny-dit ...`; its time is that of the whole generation after one
warm-up call, as xDiT's runner measures it.

    python examples/demo.py
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PROMPT = "a large red circle on the left and a small blue square on the right, striped background"
RUNS = {
    "one process": [],
    "sync": ["--parallel", "sync"],
    "distrifusion": ["--parallel", "distrifusion"],
    "otil 1/4": ["--parallel", "otil", "--otil_ratio", "1/4"],
    "otil 1/8": ["--parallel", "otil", "--otil_ratio", "1/8"],
}
DEADLINE = 300
"""Seconds that one run may take."""


@dataclass(frozen=True)
class Result:
    """One run: its picture, seconds, and rank 0's report (None on one process)."""

    name: str
    image: Image.Image
    seconds: float
    report: dict[str, float] | None


def main() -> None:
    arguments = parse_arguments()
    results = []
    for name, flags in RUNS.items():
        ranks = [] if name == "one process" else ["--patch_degree", str(arguments.ranks)]
        results.append(run(name, [*flags, *ranks], arguments))
        print(f"{name:>14}: {results[-1].seconds:.2f} s", flush=True)
    print()
    print(table(results, arguments))
    sheet(results).save(arguments.output)
    print(f"\npictures, in this order: {arguments.output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2, help="patches, for every strategy")
    parser.add_argument("--output", type=Path, default=Path("demo.png"))
    return parser.parse_args()


def run(name: str, flags: list[str], arguments: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "otil_xdit", "--model", "tiny-dit", "--prompt", arguments.prompt]
        command += ["--num_inference_steps", str(arguments.steps), "--seed", str(arguments.seed)]
        command += ["--output_directory", folder, "--warmup_calls", "1", *flags]
        command += ["--otil_report", str(report)] if flags else []
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\nfailed with exit code {done.returncode}:\n{done.stderr[-4000:]}")
        (picture,) = Path(folder).glob("*.png")
        image = Image.open(picture).convert("RGB").copy()
        (seconds,) = json.loads((Path(folder) / "timings.json").read_text())
        return Result(name, image, seconds, json.loads(report.read_text()) if flags else None)


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two 8-bit pictures; infinite where they are the same."""
    error = np.square(np.asarray(image, np.float64) - np.asarray(reference, np.float64)).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def table(results: list[Result], arguments: argparse.Namespace) -> str:
    alone = results[0]
    lines = [
        f'"{arguments.prompt}", {arguments.steps} steps, seed {arguments.seed}',
        f"{'':>14} | ranks | kB sent per step and rank | PSNR to one process | seconds",
        f"{'-' * 15}|-------|---------------------------|---------------------|--------",
    ]
    for result in results:
        ranks = arguments.ranks if result.report else 1
        sent = result.report["kv_bytes_per_step"] / 1e3 if result.report else 0.0
        close = psnr(result.image, alone.image)
        shown = "identical" if math.isinf(close) else f"{close:.1f} dB"
        lines.append(f"{result.name:>14} | {ranks:>5} | {sent:>25.1f} | {shown:>19} | {result.seconds:>7.2f}")
    lines.append("Bytes: keys, values and indices handed to collectives, mean over the steps after warm-up.")
    return "\n".join(lines)


def sheet(results: list[Result], scale: int = 2) -> Image.Image:
    """All pictures side by side, enlarged, with their names above."""
    width, height = (side * scale for side in results[0].image.size)
    margin, caption = 8, 24
    page = Image.new("RGB", (len(results) * (width + margin) + margin, height + caption + margin), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    for index, result in enumerate(results):
        left = margin + index * (width + margin)
        draw.text((left, 3), result.name, "black", font)
        page.paste(result.image.resize((width, height), Image.Resampling.LANCZOS), (left, caption))
    return page


if __name__ == "__main__":
    main()
