"""The demo: one prompt on one process, and on two with each strategy, through the same command that users type.

For a U-Net (tiny-sd) and a DiT (tiny-dit) it prints the bytes that each strategy sends, how close its picture is to one
process's, and the time, and writes the pictures side by side, a row for each model. Every run is a fresh
`xfuser --model ...`; its time is that of the whole generation after one warm-up call, as xDiT's runner measures it.

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
    "otil-paper": ["--parallel", "otil-paper"],
    "otil": ["--parallel", "otil"],
    "otil draft": ["--parallel", "otil", "--otil_quality", "draft"],
}
MODELS = {
    "tiny-sd": ["--scheduler", "dpm-solver", "--num_inference_steps", "20"],
    "tiny-dit": ["--num_inference_steps", "28"],
}
"""What is run, and how it samples."""

DEADLINE = 300
"""Seconds that one run may take."""


@dataclass(frozen=True)
class Result:
    """One run: its picture, seconds, and rank 0's report (None on one process)."""

    name: str
    image: Image.Image
    seconds: float
    report: dict[str, float] | None

    def kilobytes(self, kind: str) -> float:
        """Sent per step and rank after warm-up."""
        return self.report[f"{kind}_bytes_per_step"] / 1e3 if self.report else 0.0


def main() -> None:
    arguments = parse_arguments()
    rows = []
    for model in arguments.models:
        results = []
        for name, flags in RUNS.items():
            ranks = [] if name == "one process" else ["--patch_degree", str(arguments.ranks)]
            results.append(run(model, name, [*flags, *ranks], arguments))
            print(f"{model:>10} {name:>14}: {results[-1].seconds:.2f} s", flush=True)
        rows.append((model, results))
    print(f'\n"{arguments.prompt}", seed {arguments.seed}')
    for model, results in rows:
        print(f"\n{table(model, results, arguments)}")
    print("\nBytes: handed to collectives, mean over the steps after warm-up; a U-Net's output is left out.")
    sheet(rows).save(arguments.output)
    print(f"Pictures, in this order: {arguments.output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2, help="patches, for every strategy")
    parser.add_argument("--output", type=Path, default=Path("demo.png"))
    return parser.parse_args()


def run(model: str, name: str, flags: list[str], arguments: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "otil_xdit", "--model", model, "--prompt", arguments.prompt]
        command += [*MODELS[model], "--seed", str(arguments.seed)]
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


def table(model: str, results: list[Result], arguments: argparse.Namespace) -> str:
    lines = [
        f"{model}: {' '.join(MODELS[model])}",
        f"{'':>14} |       | kB sent per step and rank    |                     |",
        f"{'':>14} | ranks | keys, values | halo, moments | PSNR to one process | seconds",
        f"{'-' * 15}|-------|--------------|---------------|---------------------|--------",
    ]
    for result in results:
        ranks = arguments.ranks if result.report else 1
        sent = f"{result.kilobytes('kv'):>12.1f} | {result.kilobytes('small'):>13.1f}"
        close = psnr(result.image, results[0].image)
        shown = "identical" if math.isinf(close) else f"{close:.1f} dB"
        lines.append(f"{result.name:>14} | {ranks:>5} | {sent} | {shown:>19} | {result.seconds:>7.2f}")
    return "\n".join(lines)


def sheet(rows: list[tuple[str, list[Result]]], scale: int = 2) -> Image.Image:
    """A row of pictures for each model, enlarged, with their names above."""
    width, height = (side * scale for side in rows[0][1][0].image.size)
    margin, caption = 8, 24
    size = (len(rows[0][1]) * (width + margin) + margin, len(rows) * (height + caption) + margin)
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    for row, (model, results) in enumerate(rows):
        top = row * (height + caption)
        for column, result in enumerate(results):
            left = margin + column * (width + margin)
            draw.text((left, top + 3), f"{model}, {result.name}", "black", font)
            page.paste(result.image.resize((width, height), Image.Resampling.LANCZOS), (left, top + caption))
    return page


if __name__ == "__main__":
    main()
