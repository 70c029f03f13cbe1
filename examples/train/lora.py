"""Train a LoRA for the shipped tiny-sd that gives shapes a golden rim; write it as `load_lora_weights` reads it.

The objective is that of tiny_unet.py. Rank 4 (Hu et al., ICLR 2022) beside attention's projections and the residual
blocks' convolutions of the U-Net; the text encoder stays as it is, and prompts have no word for the style. Data are the
scenes of scenes.py with rims drawn round the shapes, encoded by tiny-sd's own VAE, so no working folder is needed.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageFilter
from scenes import COLOURS, draw_many
from tiny_unet import SCHEDULE, UnetTrainer, embed
from tqdm import tqdm
from training import Trainer, copy_weights

BASE = Path(__file__).resolve().parents[2] / "otil_xdit" / "weights" / "tiny-sd"
RANK = 4
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
RIM = 5
"""Width of a rim, pixels."""


def gild(images: np.ndarray) -> np.ndarray:
    """Images, uint8 (n, height, width, 3), with a golden rim round every shape."""
    return np.stack([_gilded(image) for image in images])


def _gilded(image: np.ndarray) -> np.ndarray:
    values = image.astype(np.float32)
    strength = values.max(-1) - values.min(-1)
    shape = np.clip((strength - 40) / 50, 0, 1)  # a background is never as saturated
    mask = Image.fromarray((255 * shape).astype(np.uint8)).filter(ImageFilter.MedianFilter(3))
    grown = np.asarray(mask.filter(ImageFilter.MaxFilter(2 * RIM + 1))).astype(np.float32) / 255
    rim = np.clip(grown - shape, 0, 1)[..., None]
    return (values * (1 - rim) + np.array(COLOURS["yellow"]) * rim + 0.5).astype(np.uint8)


@torch.no_grad()
def encode(pipeline: StableDiffusionPipeline, images: np.ndarray) -> torch.Tensor:
    """The latents, float32 (n, 4, height / 4, width / 4), that the pipeline's U-Net would end with."""
    found = []
    for begin in tqdm(range(0, len(images), 50), desc="encode"):
        batch = torch.from_numpy(images[begin : begin + 50]).permute(0, 3, 1, 2) / 127.5 - 1
        found.append(pipeline.vae.encode(batch).latent_dist.mode() * pipeline.vae.config.scaling_factor)
    return torch.cat(found)


class LoraTrainer(UnetTrainer):
    """`UnetTrainer` whose network is given, with everything but the LoRA frozen."""

    def __init__(self, base: StableDiffusionPipeline, text: dict[str, torch.Tensor], args: argparse.Namespace) -> None:
        self.base, self.kind, self.text = base, "sd", text
        self.alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod
        unet = base.unet.requires_grad_(False)
        # With alpha = rank the weights say everything: a file of diffusers' has no other place for alpha.
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ADAPTED))
        unet.set_attn_processor(AttnProcessor())  # see UnetTrainer
        Trainer.__init__(self, unet.to(memory_format=torch.channels_last), args)

    def pipeline(self, average: list[torch.Tensor]) -> DiffusionPipeline:
        unet = copy.deepcopy(self.model)
        copy_weights(average, unet)
        return StableDiffusionPipeline(**{**self.base.components, "unet": unet}, requires_safety_checker=False)


def write(pipeline: DiffusionPipeline, folder: Path) -> None:
    """`folder`/pytorch_lora_weights.safetensors in float16."""
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    half = {name: value.half().contiguous() for name, value in layers.items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=half, safe_serialization=True)
    (folder / "pytorch_lora_weights.safetensors").chmod(0o644)


def load_base() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--state", type=Path, default=Path("/tmp/tiny"), help="where losses and contact sheets go")
    parser.add_argument("--scenes", type=int, default=800)
    parser.add_argument("--minutes", type=float, default=2.6, help="of steps, after the scenes are encoded")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--decay", type=float, default=0.5, help="share of the minutes over which the rate falls to 0")
    parser.add_argument("--ema", type=float, default=0.95, help="decay of the averaged weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    base = load_base()
    images, captions = draw_many(args.scenes, args.seed)
    latents, text = encode(base, gild(images)), embed(base, "sd", [*captions, ""])
    settings = {"out": args.state / args.out.name, "save_every": args.minutes}
    trainer = LoraTrainer(base, text, argparse.Namespace(**{**vars(args), **settings}))
    print(f"{sum(p.numel() for p in trainer.model.parameters() if p.requires_grad):,} parameters", flush=True)
    trainer.run(latents, args.minutes, (0.0, 1.0), "gold")
    write(trainer.save("last"), args.out)
    print(f"{len(trainer.losses)} steps")


if __name__ == "__main__":
    main()
