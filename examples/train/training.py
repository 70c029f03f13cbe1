"""What the training scripts of the tiny models share: a trainer by the clock, and writing the pipeline folder."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from scenes import contact_sheet
from torch import nn
from torch.nn import functional
from tqdm import tqdm

SHEET_PROMPTS = (
    (Path(__file__).resolve().parents[2] / "otil_xdit" / "tools" / "eval" / "prompts.txt").read_text().splitlines()
)


def coarse_latents(latents: torch.Tensor) -> torch.Tensor:
    """(n, 4, 32, 32) averaged to (n, 4, 16, 16), of unit deviation again."""
    pooled = functional.avg_pool2d(latents.float(), 2)
    return (pooled / pooled.std()).to(latents.dtype)


def ship(pipeline: DiffusionPipeline, target: Path) -> None:
    """Write the pipeline in float16 beside `target`, keep the card that is there, and swap the folders."""
    fresh, old = target.with_name(target.name + ".new"), target.with_name(target.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(fresh, safe_serialization=True)
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)
    for file in fresh.rglob("config.json"):
        file.write_text(json.dumps(shipped_settings(json.loads(file.read_text())), indent=2) + "\n")
    pipeline.to(dtype=torch.float32)
    for kept in ("README.md", "loss.png"):
        if (target / kept).exists():
            shutil.copy(target / kept, fresh / kept)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def shipped_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The config of a part, so that it loads and runs in diffusers without being told anything."""
    shipped = {key: value for key, value in settings.items() if key != "_name_or_path"}  # nobody's business
    if "dtype" in shipped:
        shipped["dtype"] = "float32"  # transformers would load in the files' type, and diffusers loads in float32
    if "force_upcast" in shipped:
        shipped["force_upcast"] = False  # float16 is enough, and SDXL's upcast asks for a convolution that is not there
    return shipped


class Trainer(ABC):
    """Model, averaged weights, optimizer, and the loss so far."""

    def __init__(self, model: nn.Module, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.average = [p.detach().clone() for p in model.parameters()]
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.losses: list[float] = []

    @abstractmethod
    def loss(self, latents: torch.Tensor) -> torch.Tensor:
        """The loss of one random batch of `latents`, (n, 4, side, side)."""

    @abstractmethod
    def pipeline(self, average: list[torch.Tensor]) -> DiffusionPipeline:
        """The whole pipeline round a network of these weights."""

    def step(self, latents: torch.Tensor, rate: float) -> float:
        """One step at `rate` times the learning rate."""
        loss = self.loss(latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = self.args.lr * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        decay = min(self.args.ema, len(self.losses) / (10 + len(self.losses)))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], 1 - decay)
        return self.losses[-1]

    def run(self, latents: torch.Tensor, minutes: float, span: tuple[float, float], name: str) -> None:
        """Train by the clock; `span` says which part of the whole schedule this stage is."""
        start, bar, saved = time.time(), tqdm(desc=name), 0.0
        while (elapsed := (time.time() - start) / 60) < minutes:
            done = span[0] + (span[1] - span[0]) * elapsed / minutes
            rate = min(1.0, len(self.losses) / 100, (1 - done) / self.args.decay)
            bar.set_postfix(loss=f"{self.step(latents, rate):.3f}", done=f"{done:.0%}", refresh=False)
            bar.update()
            if elapsed - saved > self.args.save_every:
                saved = elapsed
                self.save(f"{name}-{bar.n}")
        bar.close()

    def save(self, name: str) -> DiffusionPipeline:
        """State, losses, and a contact sheet, in the output folder's neighbourhood."""
        out = self.args.out
        out.parent.mkdir(parents=True, exist_ok=True)
        pipeline = self.pipeline(self.average)
        state = {"model": self.model.state_dict(), "average": self.average, "optimizer": self.optimizer.state_dict()}
        torch.save(state, out.with_name(f"{out.name}-state.pt"))
        out.with_name(f"{out.name}-losses.json").write_text(json.dumps([round(loss, 4) for loss in self.losses]))
        pipeline.set_progress_bar_config(disable=True)
        self.sheet(pipeline).save(out.with_name(f"{out.name}-sheet-{name}.png"))
        return pipeline

    def sheet(self, pipeline: DiffusionPipeline) -> Image.Image:
        """What the pipeline draws of a few prompts."""
        draw = torch.Generator().manual_seed(0)
        images = pipeline(SHEET_PROMPTS, num_inference_steps=15, guidance_scale=4.0, generator=draw, output_type="np")
        return contact_sheet((images.images * 255).round().astype(np.uint8), SHEET_PROMPTS)

    def resume(self) -> None:
        out = self.args.out
        state = torch.load(out.with_name(f"{out.name}-state.pt"))
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.losses = json.loads(out.with_name(f"{out.name}-losses.json").read_text())
        self.optimizer.load_state_dict(state["optimizer"])


def copy_weights(source: list[torch.Tensor], model: nn.Module) -> None:
    """Put averaged weights into a network of the same build."""
    for parameter, value in zip(model.parameters(), source, strict=True):
        parameter.data.copy_(value)


def add_training_args(parser: argparse.ArgumentParser, coarse: float, fine: float, batch: int, lr: float) -> None:
    """The flags that every training script has, with its own defaults."""
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny"), help="with latents.pt, vae/, text_encoder/ ...")
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--coarse", type=float, default=coarse, help="minutes on averaged latents")
    parser.add_argument("--fine", type=float, default=fine, help="minutes on whole latents")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--decay", type=float, default=0.4, help="share of the schedule over which the rate falls to 0")
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights")
    parser.add_argument("--save-every", type=float, default=4.0, help="minutes between contact sheets")
    parser.add_argument("--resume", action="store_true", help="go on from the state beside the output folder")
    parser.add_argument("--seed", type=int, default=0)
