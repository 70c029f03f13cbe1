"""Which files of the package one call walks through, for docs/architecture.md; prints one JSON object for each walk.

torchrun --nproc_per_node 2 tests/workers/walks.py

A walk is what Python's profiler sees in rank 0: each file once, in the order in which it is entered first, and each
call from a file to one of a higher floor.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import otil_xdit  # noqa: E402
from otil_xdit.catalog.bundled import model_folder  # noqa: E402
from otil_xdit.catalog.folders import OWN, load_pipe  # noqa: E402
from otil_xdit.xdit.launcher import main as launcher  # noqa: E402
from tests.test_layout import FLOORS  # noqa: E402

PACKAGE = f"{ROOT / 'otil_xdit'}/"
LAYERS = {
    "keys and values of one layer": "down_blocks.0.attentions.1.transformer_blocks.0.attn1",
    "a border row": "conv_in",
    "moments, and rows for the next convolution": "down_blocks.0.resnets.1.norm1",
}
STEPS, STEP = 14, 11
"""The step that is walked waits for nothing."""


class Walk:
    """The files that are entered while `called` is the profiler."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.climbs: list[str] = []

    def called(self, frame: Any, event: str, argument: Any) -> None:
        """Note a call; see `sys.setprofile`."""
        if event != "call" or (name := _file(frame)) is None:
            return
        if name not in self.files:
            self.files.append(name)
        caller = frame.f_back
        while caller is not None and _file(caller) is None:
            caller = caller.f_back
        if caller is None or len(self.files) == 1:
            return
        climb = f"{_file(caller)} -> {name}"
        if _floor(name) > _floor(_file(caller)) and climb not in self.climbs:
            self.climbs.append(climb)

    def show(self, what: str) -> None:
        """Print the walk on rank 0."""
        if dist.get_rank() == 0:
            print(json.dumps({"walk": what, "files": self.files, "climbs": self.climbs}), flush=True)


def _file(frame: Any) -> str | None:
    name = frame.f_code.co_filename
    return name.removeprefix(PACKAGE) if name.startswith(PACKAGE) else None


def _floor(name: str | None) -> int:
    folder = str(name).partition("/")[0].removesuffix(".py")
    return FLOORS.index(folder) if folder in FLOORS else -1


def main() -> None:
    dist.init_process_group()
    pipe = otil_xdit.parallelize(load_pipe(model_folder("tiny-sd"), OWN, None), "otil")
    walks = {what: Walk() for what in LAYERS}
    done = [0]

    def count(pipe: Any, step: int, timestep: Any, given: Any) -> Any:
        done[0] = step + 1
        return given

    walk_of = {pipe.unet.get_submodule(name): walks[what] for what, name in LAYERS.items()}

    def before(layer: nn.Module, given: Any) -> None:
        if layer in walk_of and done[0] == STEP:
            sys.setprofile(walk_of[layer].called)

    def after(layer: nn.Module, given: Any, result: Any) -> None:
        if layer in walk_of:
            sys.setprofile(None)

    register_module_forward_pre_hook(before)
    register_module_forward_hook(after)
    pipe("a large red circle", num_inference_steps=STEPS, callback_on_step_end=count)
    for what, walk in walks.items():
        walk.show(what)
    flags = ["--model", "tiny-sd", "--parallel", "otil", "--patch_degree", "2", "--otil_ratio", "1/4", "--prompt", "a"]
    launcher.plan(flags, {})  # imports what it needs
    walk = Walk()
    sys.setprofile(walk.called)
    launcher.plan(flags, {})
    sys.setprofile(None)
    walk.show("a flag")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
