"""How the autoencoders of images and of clips are trained: the loss, and one cycle by the clock."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch.nn import functional
from tqdm import tqdm

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""How far what is decoded is from what was encoded."""


def gradient_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 between the finite differences of two batches, (n, c, h, w) or (n, c, frames, h, w): keeps edges sharp."""
    dims = range(2, target.ndim)
    return sum(functional.l1_loss(output.diff(dim=dim), target.diff(dim=dim)) for dim in dims)


def edge_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 of two batches and of their differences in space and time."""
    return functional.l1_loss(output, target) + 0.5 * gradient_loss(output, target)


def square_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error, as large as `edge_loss` where an autoencoder has learned little."""
    return 4 * functional.mse_loss(output, target)


def step_loss(vae: ModelMixin, batch: torch.Tensor, distance: Distance, kl_weight: float) -> torch.Tensor:
    """How far a batch is from what is decoded of it, and a little KL."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(batch).latent_dist
        output = vae.decode(posterior.sample()).sample.float()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return distance(output, batch) + kl_weight * kl


def train(
    vae: ModelMixin,
    draw: Callable[[np.random.Generator], torch.Tensor],
    minutes: float,
    args: argparse.Namespace,
    distance: Distance = edge_loss,
) -> None:
    """AdamW, one cosine cycle; time-limited: the schedule follows the clock, so it ends after `minutes`.

    Args:
        vae: in training mode.
        draw: makes a batch.
        minutes: of training.
        args: seed, lr, and the weight of KL as ``kl``.
        distance: that is made small.
    """
    rng = np.random.default_rng(args.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    start, bar = time.time(), tqdm(desc="vae", mininterval=10)
    while (done := (time.time() - start) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (bar.n + 1) / 50) * (0.01 + 0.99 * np.cos(done * np.pi / 2) ** 2)
        loss = step_loss(vae, draw(rng), distance, args.kl)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.4f}", done=f"{done:.0%}", refresh=False)
    bar.close()
