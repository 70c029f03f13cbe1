"""Draw the loss curve that tiny_dit.py or tiny_unet.py left beside its output folder.

python examples/train/plot_loss.py /tmp/tiny/tiny-sd-losses.json --out otil_xdit/weights/tiny-sd/loss.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("losses", type=Path, help="FOLDER-losses.json")
    parser.add_argument("--out", type=Path, default=Path("loss.png"))
    parser.add_argument("--window", type=int, default=25, help="steps of the running mean")
    args = parser.parse_args()
    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = np.array(json.loads(args.losses.read_text()))
    mean = np.convolve(losses, np.ones(args.window) / args.window, "valid")
    figure, axes = pyplot.subplots(figsize=(5, 2.6), dpi=90)
    axes.plot(losses, color="0.85", linewidth=0.6)
    axes.plot(np.arange(len(mean)) + args.window // 2, mean)
    axes.set(xlabel="step", ylabel="training loss", ylim=(0, 1.5 * np.median(mean[: len(mean) // 4])))
    figure.tight_layout()
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
