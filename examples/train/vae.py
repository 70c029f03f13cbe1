"""Train the tiny autoencoder (128 x 128 x 3 images <-> 32 x 32 x 4 latents) on drawn scenes, and cache latents.

The architecture is diffusers' AutoencoderKL; latents are scaled and shifted to zero mean and unit deviation with the
numbers that this script measures and writes in the configuration.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from autoencoding import train
from diffusers import AutoencoderKL
from scenes import contact_sheet, draw_many, parse, read
from tqdm import tqdm


def build() -> AutoencoderKL:
    """Three levels, so images shrink by 4; four latent channels; no attention; little latent noise at first."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    torch.nn.init.constant_(vae.encoder.conv_out.bias[4:], -5.0)  # of the log variances
    return vae


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, height, width, 3) to float (n, 3, height, width) in -1..1, channels last in memory."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(
        memory_format=torch.channels_last
    )


def to_images(batch: torch.Tensor) -> np.ndarray:
    """The inverse of `to_tensor`, clipped."""
    return ((batch.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def crop(images: np.ndarray, batch: int, side: int, rng: np.random.Generator) -> torch.Tensor:
    """A random batch of square crops, (batch, 3, side, side)."""
    top, left = rng.integers(0, images.shape[1] - side + 1, 2)
    chosen = images[rng.integers(0, len(images), batch)]
    return to_tensor(chosen[:, top : top + side, left : left + side])


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, batch: int = 32) -> torch.Tensor:
    """Raw latent means (n, 4, height / 4, width / 4), not scaled."""
    parts = []
    for begin in tqdm(range(0, len(images), batch), desc="encode"):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(vae.encode(to_tensor(images[begin : begin + batch])).latent_dist.mean.float().contiguous())
    return torch.cat(parts)


@torch.no_grad()
def report(vae: AutoencoderKL, seed: int, sheet: Path, count: int = 200) -> None:
    """PSNR in dB, and the reader's score on drawn and on reconstructed fresh scenes, in float32."""
    images, captions = draw_many(count, seed)
    decoded = [vae.decode(vae.encode(to_tensor(part)).latent_dist.mean).sample for part in np.array_split(images, 20)]
    output = to_images(torch.cat(decoded))
    error = np.square(output.astype(float) - images).mean()
    scores = {
        name: np.mean([read(p, parse(c))["right"] for p, c in zip(shown, captions, strict=True)])
        for name, shown in (("drawn", images), ("reconstructed", output))
    }
    print(f"PSNR {10 * np.log10(255**2 / error):.2f} dB, reader right: {scores}")
    both = np.concatenate([images[:8], output[:8]])
    contact_sheet(both, captions[:8] * 2).save(sheet)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny"), help="where vae/ and latents.pt are written")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time")
    parser.add_argument("--scenes", type=int, default=12000, help="scenes to draw, train on and encode")
    parser.add_argument("--batch", type=int, default=8, help="64 x 64 crops per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=1e-5, help="weight of the KL term")
    parser.add_argument("--resume", action="store_true", help="go on from the weights in the working folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    images, captions = draw_many(args.scenes, args.seed + 1)
    vae = AutoencoderKL.from_pretrained(args.work / "vae") if args.resume else build()
    vae = vae.train().to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {args.scenes} scenes drawn", flush=True)
    train(vae, lambda rng: crop(images, args.batch, 64, rng), args.minutes, args)
    vae.eval()
    latents = encode(vae, images)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    vae.save_pretrained(args.work / "vae")
    torch.save({"latents": ((latents - shift) * scale).half(), "captions": captions}, args.work / "latents.pt")
    print(f"shift_factor {shift:.4f}, scaling_factor {scale:.4f}")
    report(vae, args.seed + 2, args.work / "vae.png")


if __name__ == "__main__":
    main()
