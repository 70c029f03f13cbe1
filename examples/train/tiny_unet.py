"""Train tiny-sd or tiny-sdxl (U-Nets of the topology of SD1.5 and of SDXL) on cached latents; write the folder.

The usual diffusion objective: 1000 noise levels on SD's scaled-linear schedule, the network predicts the noise, the
loss is weighted by min-SNR (Hang et al., ICCV 2023, gamma = 5). Two stages as for tiny-dit: averaged latents first.
tiny-sdxl learns what SDXL's micro-conditions mean: some batches are blurred and say a smaller original size, some are
shifted and say where the crop began.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional
from tqdm import tqdm
from training import Trainer, add_training_args, coarse_latents, copy_weights, ship
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PIXELS = 4  # of a latent pixel, per side
TEXT_WIDTH = 64
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}


def build_sd() -> UNet2DConditionModel:
    """SD1.5's topology: four levels, attention on the upper three, convolutions round each transformer."""
    return UNet2DConditionModel(
        sample_size=32,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(32, 48, 64, 64),
        layers_per_block=2,
        attention_head_dim=2,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )


def build_sdxl() -> UNet2DConditionModel:
    """SDXL's topology: three levels, none of them the top one with attention, more of it further down."""
    return UNet2DConditionModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 56, 64),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 2, 4),
        cross_attention_dim=2 * TEXT_WIDTH,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + TEXT_WIDTH,
    )


BUILDERS = {"sd": build_sd, "sdxl": build_sdxl}


def build_pipeline(work: Path, kind: str, unet: UNet2DConditionModel) -> DiffusionPipeline:
    """The pipeline round a U-Net, with what vae.py and text_encoder.py left in `work`."""
    vae = AutoencoderKL.from_pretrained(work / "vae")
    vae.register_to_config(shift_factor=None)  # which these pipelines ignore; the latents carry it instead
    parts = {
        "vae": vae,
        "unet": unet,
        "scheduler": DDIMScheduler(**SCHEDULE),
        "tokenizer": CLIPTokenizer.from_pretrained(work / "tokenizer"),
        "text_encoder": CLIPTextModel.from_pretrained(work / "text_encoder"),
    }
    if kind == "sd":
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    parts["tokenizer_2"] = CLIPTokenizer.from_pretrained(work / "tokenizer_2")
    parts["text_encoder_2"] = CLIPTextModelWithProjection.from_pretrained(work / "text_encoder_2")
    # The empty prompt that the network learned is an encoded one, not zeros.
    return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=False, add_watermarker=False)


@torch.no_grad()
def embed(pipeline: DiffusionPipeline, kind: str, captions: list[str]) -> dict[str, torch.Tensor]:
    """The pipeline's own embeddings: words (n, 24, d), and for SDXL pooled (n, 64)."""
    found: dict[str, list[torch.Tensor]] = {"words": [], "pooled": []}
    for begin in tqdm(range(0, len(captions), 250), desc="embed"):
        part = captions[begin : begin + 250]
        if kind == "sd":
            text = pipeline.encode_prompt(part, "cpu", 1, do_classifier_free_guidance=False)
        else:
            text = pipeline.encode_prompt(part, device="cpu", do_classifier_free_guidance=False)
            found["pooled"].append(text[2])
        found["words"].append(text[0])
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def crop_and_blur(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch as SDXL's training saw images, and its micro-conditions (6,): original size, crop, target size."""
    size = latents.shape[-1] * PIXELS
    ids = torch.tensor([128, 128, 0, 0, size, size], dtype=torch.float32)
    if torch.rand(()) < 0.1:
        ids[:2] /= 2
        latents = functional.interpolate(functional.avg_pool2d(latents, 2), scale_factor=2.0)
    if torch.rand(()) < 0.15:
        top, left = torch.randint(0, latents.shape[-1] // 8, (2,)).tolist()
        ids[2:4] = torch.tensor([top, left]) * PIXELS
        padded = functional.pad(latents, (0, left, 0, top), mode="reflect")
        latents = padded[..., top:, left:]
    return latents, ids


class UnetTrainer(Trainer):
    """Noise prediction with min-SNR weights; a tenth of the batch has the empty prompt."""

    def __init__(self, kind: str, text: dict[str, torch.Tensor], args: argparse.Namespace) -> None:
        model = BUILDERS[kind]().to(memory_format=torch.channels_last)
        # Heads are so narrow that torch's fused attention on the CPU takes three quarters of a step.
        model.set_attn_processor(AttnProcessor())
        super().__init__(model, args)
        self.kind, self.text = kind, text
        self.alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod

    def loss(self, latents: torch.Tensor) -> torch.Tensor:
        rows = torch.randint(len(latents), (self.args.batch,))
        empty = len(self.text["words"]) - 1
        texts = torch.where(torch.rand(len(rows)) < 0.1, empty, rows)
        clean, conditions = latents[rows].float(), None
        if self.kind == "sdxl":
            clean, ids = crop_and_blur(clean)
            conditions = {"text_embeds": self.text["pooled"][texts].float(), "time_ids": ids.expand(len(rows), 6)}
        steps = ((torch.arange(len(rows)) + torch.rand(len(rows))) * 1000 / len(rows)).long()
        alpha = self.alphas[steps][:, None, None, None]
        noise = torch.randn_like(clean)
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            output = self.model(noisy, steps, self.text["words"][texts].float(), added_cond_kwargs=conditions).sample
        weight = (5 * (1 - alpha) / alpha).clamp(max=1)
        return (weight * (output.float() - noise).square()).mean()

    def pipeline(self, average: list[torch.Tensor]) -> DiffusionPipeline:
        unet = BUILDERS[self.kind]()
        copy_weights(average, unet)
        return build_pipeline(self.args.work, self.kind, unet)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=sorted(BUILDERS))
    add_training_args(parser, coarse=10.0, fine=20.0, batch=32, lr=1e-3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    saved, vae = torch.load(args.work / "latents.pt"), AutoencoderKL.load_config(args.work / "vae")
    latents = (saved["latents"].float() + vae["shift_factor"] * vae["scaling_factor"]).half()
    text = embed(build_pipeline(args.work, args.kind, BUILDERS[args.kind]()), args.kind, [*saved["captions"], ""])
    trainer = UnetTrainer(args.kind, {name: part.half() for name, part in text.items()}, args)
    print(f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters", flush=True)
    if args.resume:
        trainer.resume()
    split = args.coarse / max(args.coarse + args.fine, 1e-9)
    if args.coarse:
        trainer.run(coarse_latents(latents), args.coarse, (0.0, split), "coarse")
    if args.fine:
        trainer.run(latents, args.fine, (split, 1.0), "fine")
    ship(trainer.save("last"), args.out)
    print(f"{len(trainer.losses)} steps")


if __name__ == "__main__":
    main()
