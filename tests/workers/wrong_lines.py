"""Command lines of `xfuser` that are wrong, or look it: what is said, with which exit code, after how much CPU time.

    python tests/workers/wrong_lines.py [--only WORDS]

Each is a process of its own, as a shell starts it, in which starting ranks is replaced by saying so. The table goes to
stdout. Exit code 1 where a line ends in another way than it should.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from otil_xdit.catalog.bundled import model_folder  # noqa: E402

START = """
import sys
from otil_xdit.xdit.launcher import main as launcher
launcher.run_to_end = lambda command, environment: print("starts its ranks", file=sys.stderr) or 0
sys.exit(launcher.main(sys.argv[1:]))
"""
BASE = ["--parallel", "otil", "--patch_degree", "2"]
UNET = "unet/diffusion_pytorch_model.safetensors"


def line(text: str, prompt: str | None = "x", model: str = "tiny-sd") -> list[str]:
    """A command line with what every other one has, too."""
    return ["--model", model, *BASE, *(["--prompt", prompt] if prompt else []), *text.split()]


LINES: dict[str, list[str]] = {
    "--parallel nonsense": ["--model", "tiny-sd", "--prompt", "x", "--parallel", "nonsense"],
    "--otil_ratio 1.5": line("--otil_ratio 1.5"),
    "--model tny-dit": line("", model="tny-dit"),
    "--nproc_per_node 4 --patch_degree 3": line("--nproc_per_node 4 --patch_degree 3"),
    "no --prompt": line("", prompt=None),
    "--prompt without a text": line("--prompt", prompt=None),
    "--num_inference_steps 0": line("--num_inference_steps 0"),
    "--num_inference_steps -3": line("--num_inference_steps -3"),
    "--height 0": line("--height 0"),
    "--guidance_scale nan": line("--guidance_scale nan"),
    "--seed of 20 digits": line("--seed 99999999999999999999"),
    "three negative prompts for two": line("--prompt a b --negative_prompt c d e", prompt=None),
    "--dataset_path of no file": line("--dataset_path /nowhere.csv"),
    "--input_images of no file": line("--input_images /nowhere.png"),
    "--fully_shard_degree 2": line("--fully_shard_degree 2"),
    "--use_fp8_gemms": line("--use_fp8_gemms"),
    "--attention_backend wrong": line("--attention_backend wrong"),
    "--batch 2": line("--batch 2"),
    "--nproc 2": line("--nproc 2"),
    "--master_p 29611": line("--master_p 29611"),
    "--output_directory of no folder": line("--output_directory /nowhere"),
    "--ulysses_degree 0": line("--ulysses_degree 0"),
}

FOLDERS: dict[str, Callable[[Path], object]] = {
    "unet/config.json empty": lambda folder: (folder / "unet" / "config.json").write_text("{}"),
    "unet/config.json without attention_head_dim": lambda folder: configured(folder, attention_head_dim=None),
    "3 heads for 4 blocks": lambda folder: configured(folder, attention_head_dim=[8, 8, 8]),
    "a text for sample_size": lambda folder: configured(folder, sample_size="large"),
    "*.fp16.safetensors only": lambda folder: [
        file.rename(file.with_suffix(".fp16.safetensors")) for file in folder.rglob("*.safetensors")
    ],
    "no weights": lambda folder: (folder / UNET).unlink(),
    "weights cut off": lambda folder: os.truncate(folder / UNET, 1_000_000),
}
STARTS = (
    "unet/config.json empty",
    "unet/config.json without attention_head_dim",
    "*.fp16.safetensors only",
)
"""What diffusers can load, so that it starts its ranks; all others are one line and exit code 2."""


def configured(folder: Path, **values: object) -> None:
    """Change settings of the U-Net's config; None takes one out."""
    path = folder / "unet" / "config.json"
    settings = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="Lines that have these words in their name.")
    only = parser.parse_args().only
    print("| `xfuser` with | said | exit code | CPU s |\n|---|---|---|---|", flush=True)
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        for what in [what for what in (*LINES, *FOLDERS) if only in what]:
            arguments = LINES.get(what) or line("", model=str(made(what, Path(name))))
            said, code, seconds = tried(arguments)
            right = (code, "starts its ranks" in said) == ((0, True) if what in STARTS else (2, False))
            bad += not (right and "Traceback" not in said)
            told = said.removeprefix("xfuser: error: ").replace(f"{name}/", "").replace("|", "/")
            print(f"| {what} | {re.sub(chr(10), ' ', told)[:300]} | {code} | {seconds:.1f} |", flush=True)
    return int(bad > 0)


def made(what: str, place: Path) -> Path:
    """The model's folder, changed."""
    folder = place / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model_folder("tiny-sd"), folder)
    FOLDERS[what](folder)
    return folder


def tried(arguments: list[str]) -> tuple[str, int, float]:
    """What is said, the exit code, and the CPU seconds of user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", START, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stderr.strip(), done.returncode, sum(after[:2]) - sum(before[:2])


if __name__ == "__main__":
    sys.exit(main())
