"""Train the tiny video autoencoder (9 x 64 x 64 x 3 clips <-> 5 x 16 x 16 x 8 latents) and cache latents.

The architecture is Wan's causal one, diffusers' AutoencoderKLWan. The mean and the deviation of each latent channel are
measured at the end and written in the configuration, as the pipeline wants them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from autoencoding import square_loss, train
from diffusers import AutoencoderKLWan
from moving_scenes import draw_many, strip
from scenes import contact_sheet
from tqdm import tqdm

CHANNELS = 8  # of the latents


def build() -> AutoencoderKLWan:
    """One level in space and time on top of 2 x 2 pixels at once: 4 times smaller a side, 9 frames in 5."""
    vae = AutoencoderKLWan(
        base_dim=24,
        z_dim=CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    initialise(vae)
    return vae


@torch.no_grad()
def initialise(vae: AutoencoderKLWan) -> None:
    """Make every part pass on what it gets, each frame by itself.

    From diffusers' own random weights it stays at the mean colour for thousands of steps: its norms keep no size, so
    little of the picture comes through, and L1 is content with the median. Here residual branches begin small, other
    convolutions are near a rotation of the channels at a pixel, and nothing comes from earlier frames.
    """
    for name, layer in vae.named_modules():
        if not isinstance(layer, torch.nn.Conv2d | torch.nn.Conv3d):
            continue
        weight = layer.weight.zero_()
        torch.nn.init.zeros_(layer.bias)
        last = weight[:, :, -1] if weight.ndim == 5 else weight  # of a causal kernel, the frame itself
        rows, columns = last.shape[2:]
        if ".resnets." in name and rows > 1:
            torch.nn.init.kaiming_normal_(last, nonlinearity="linear")
            last.mul_(0.3 if name.endswith("conv2") else 1.0)
        elif name.endswith("to_qkv"):
            torch.nn.init.kaiming_normal_(last, nonlinearity="linear")
        elif layer.stride[-1] == 2:
            for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):  # the pixels that become one
                last[:, :, row, column] = 0.5 * _rotation(last)
        elif name.startswith("encoder") and name.endswith("time_conv"):
            weight[:, :, 1:, 0, 0] = 0.5 * torch.eye(len(weight))[..., None]  # the mean of two frames
        elif name.endswith("time_conv"):
            last[:, :, 0, 0] = torch.eye(last.shape[1]).repeat(2, 1)  # the same frame twice
        elif not name.endswith("attentions.0.proj"):
            last.add_(0.1 * torch.randn_like(last) / (last[0].numel() ** 0.5))
            last[:, :, rows // 2, columns // 2] = _rotation(last)
    vae.quant_conv.weight[CHANNELS:].mul_(0.01)
    vae.quant_conv.bias[CHANNELS:] = -5.0  # of the log variances: little noise at first
    vae.decoder.conv_out.weight.mul_(0.2)


def _rotation(weight: torch.Tensor) -> torch.Tensor:
    """Return a random matrix with orthogonal rows or columns, for one place of a kernel."""
    return torch.nn.init.orthogonal_(torch.empty(weight.shape[:2]))


def to_tensor(clips: np.ndarray) -> torch.Tensor:
    """uint8 (n, frames, height, width, 3) to float (n, 3, frames, height, width) in -1..1."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_clips(batch: torch.Tensor) -> np.ndarray:
    """The inverse of `to_tensor`, clipped."""
    return ((batch.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()


def crop(clips: np.ndarray, batch: int, side: int, rng: np.random.Generator) -> torch.Tensor:
    """A random batch of square crops, (batch, 3, frames, side, side)."""
    top, left = rng.integers(0, clips.shape[2] - side + 1, 2)
    return to_tensor(clips[rng.integers(0, len(clips), batch), :, top : top + side, left : left + side])


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: np.ndarray, batch: int = 16) -> torch.Tensor:
    """Latent means as they are, (n, CHANNELS, 5, 16, 16)."""
    parts = []
    for begin in tqdm(range(0, len(clips), batch), desc="encode", mininterval=10):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(vae.encode(to_tensor(clips[begin : begin + batch])).latent_dist.mean.float())
    return torch.cat(parts)


@torch.no_grad()
def report(vae: AutoencoderKLWan, seed: int, sheet: Path, count: int = 32) -> None:
    """Print the PSNR of fresh clips in float32, and draw some of them over what the autoencoder makes of them."""
    clips, captions = draw_many(count, seed)
    output = to_clips(torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample for x in to_tensor(clips).split(8)]))
    print(f"PSNR {10 * np.log10(255**2 / np.square(output.astype(float) - clips).mean()):.2f} dB")
    both = [strip(clip) for pair in zip(clips[:6], output[:6], strict=True) for clip in pair]
    contact_sheet(np.stack(both), [text for text in captions[:6] for _ in "ab"], columns=1).save(sheet)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny-video"), help="for vae/ and latents.pt")
    parser.add_argument("--frame_minutes", type=float, default=4.0, help="training on single frames")
    parser.add_argument("--minutes", type=float, default=8.0, help="training on clips after that")
    parser.add_argument("--clips", type=int, default=6000, help="clips to draw, train on and encode")
    parser.add_argument("--batch", type=int, default=8, help="32 x 32 crops of whole clips a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=1e-5, help="weight of the KL term")
    parser.add_argument("--resume", action="store_true", help="go on from the weights in the working folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    clips, captions = draw_many(args.clips, args.seed + 1)
    vae = AutoencoderKLWan.from_pretrained(args.work / "vae") if args.resume else build()
    vae.train()
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {args.clips} clips drawn", flush=True)
    if args.frame_minutes:
        train(vae, lambda rng: crop(clips[:, :1], args.batch, 32, rng), args.frame_minutes, args, square_loss)
    train(vae, lambda rng: crop(clips, args.batch, 32, rng), args.minutes, args)
    vae.eval()
    latents = encode(vae, clips)
    mean, deviation = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    vae.save_pretrained(args.work / "vae")
    scaled = (latents - mean.view(-1, 1, 1, 1)) / deviation.view(-1, 1, 1, 1)
    torch.save({"latents": scaled.half(), "captions": captions}, args.work / "latents.pt")
    report(vae, args.seed + 2, args.work / "vae.png")


if __name__ == "__main__":
    main()
