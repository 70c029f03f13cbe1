"""Train the tiny Stable Diffusion 3 transformer on cached latents and write the whole pipeline folder.

Flow matching: with sigma in 0..1, x = (1 - sigma) * latents + sigma * noise, the model predicts noise - latents.
Two stages: first on latents averaged over 2 x 2 (four times fewer tokens; learns what goes where), then on whole
ones. The pipeline appends zeros to the prompt in place of a third encoder, 256 tokens by default. All of them are
alike and stay alike, so training carries one and adds log(number) to its attention scores, which is exactly the same;
the number is drawn anew for each step, so that any `max_sequence_length` works.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from text_encoder import MAX_LENGTH
from torch.nn import functional
from tqdm import tqdm
from training import Trainer, add_training_args, coarse_latents, copy_weights, ship
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

HEADS, HEAD_DIM, LAYERS = 4, 32, 5
SHIFT = 2.0  # of the noise levels towards noise, in training and in the shipped scheduler
MOST_ZEROS = 256


# ---- models --------------------------------------------------------------------------------------------------------


def build_transformer() -> SD3Transformer2DModel:
    """The shipped architecture; modulations and the last layer start at zero, so each block starts as identity."""
    model = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=128,
        caption_projection_dim=HEADS * HEAD_DIM,
        pooled_projection_dim=128,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )
    modulations = [norm.linear for b in model.transformer_blocks for norm in (b.norm1, b.norm1_context)]
    for layer in (*modulations, model.norm_out.linear, model.proj_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


def build_pipeline(work: Path, transformer: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    """The pipeline round a transformer, with what vae.py and text_encoder.py left in `work`."""
    encoders = [CLIPTextModelWithProjection.from_pretrained(work / f"text_encoder{s}") for s in ("", "_2")]
    tokenizers = [CLIPTokenizer.from_pretrained(work / f"tokenizer{s}") for s in ("", "_2")]
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )


@torch.no_grad()
def embed(pipeline: StableDiffusion3Pipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's own embeddings, with one zero token: (n, MAX_LENGTH + 1, 128) and pooled (n, 128)."""
    words, pooled = [], []
    for begin in tqdm(range(0, len(captions), 250), desc="embed"):
        part = captions[begin : begin + 250]
        text = pipeline.encode_prompt(part, None, None, do_classifier_free_guidance=False, max_sequence_length=1)
        words.append(text[0])
        pooled.append(text[2])
    return torch.cat(words), torch.cat(pooled)


class BiasedJointAttention:
    """Joint attention of image and text tokens (the processor of SD3 in diffusers) with a bias on each key."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        bias: torch.Tensor,
        attention_mask: None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (n, pixels, d), text (n, words, d), bias (pixels + words,); returns the two, attended."""

        def joined(norms: tuple, *layers: torch.nn.Linear) -> torch.Tensor:
            parts = zip(norms, layers, (hidden_states, encoder_hidden_states), strict=True)
            heads = [(norm, layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)) for norm, layer, x in parts]
            return torch.cat([norm(x).to(x.dtype) if norm else x for norm, x in heads], dim=2)

        query = joined((attn.norm_q, attn.norm_added_q), attn.to_q, attn.add_q_proj)
        key = joined((attn.norm_k, attn.norm_added_k), attn.to_k, attn.add_k_proj)
        value = joined((None, None), attn.to_v, attn.add_v_proj)
        mask = bias.to(query.dtype).expand(1, 1, len(bias), -1)
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        sizes = [hidden_states.shape[1], encoder_hidden_states.shape[1]]
        image, text = output.transpose(1, 2).flatten(2).split(sizes, dim=1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


# ---- stages --------------------------------------------------------------------------------------------------------


def coarse_positions(positions: torch.Tensor) -> torch.Tensor:
    """Position table (1, 32 * 32, d) whose middle 8 x 8 hold the means over 2 x 2 of the middle 16 x 16."""
    grid = positions.view(32, 32, -1)
    table = torch.zeros_like(grid)
    table[12:20, 12:20] = grid[8:24, 8:24].unflatten(0, (8, 2)).unflatten(2, (8, 2)).mean((1, 3))
    return table.view_as(positions)


def noise_levels(batch: int) -> torch.Tensor:
    """Shifted logit-normal sigmas (batch,), one from each of `batch` equally likely strata."""
    normal = torch.special.ndtri((torch.arange(batch) + torch.rand(batch)).clamp(0.01) / batch)
    level = torch.sigmoid(normal)
    return SHIFT * level / (1 + (SHIFT - 1) * level)


class DitTrainer(Trainer):
    """Flow matching; a tenth of the batch has the empty prompt."""

    def __init__(self, data: dict[str, torch.Tensor], model: SD3Transformer2DModel, args: argparse.Namespace) -> None:
        super().__init__(model, args)
        model.set_attn_processor(BiasedJointAttention())
        self.data = data

    def batch(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Latents, words, pooled (a tenth of them of the empty prompt), sigmas, and the keys' bias."""
        rows = torch.randint(len(latents), (self.args.batch,))
        texts = torch.where(torch.rand(len(rows)) < 0.1, len(self.data["pooled"]) - 1, rows)  # the last one is empty
        bias = torch.zeros(latents.shape[-1] ** 2 // 4 + MAX_LENGTH + 1)
        bias[-1] = math.log(MOST_ZEROS) * (1 if torch.rand(()) < 0.5 else torch.rand(()).item())
        words, pooled = self.data["words"][texts].float(), self.data["pooled"][texts].float()
        return latents[rows].float(), words, pooled, noise_levels(len(rows)), bias

    def loss(self, latents: torch.Tensor) -> torch.Tensor:
        clean, words, pooled, sigma, bias = self.batch(latents)
        noise, level = torch.randn_like(clean), sigma[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            noisy = (1 - level) * clean + level * noise
            output = self.model(noisy, words, pooled, sigma * 1000, joint_attention_kwargs={"bias": bias}).sample
        return functional.mse_loss(output.float(), noise - clean)

    def pipeline(self, average: list[torch.Tensor]) -> StableDiffusion3Pipeline:
        model = build_transformer()
        copy_weights(average, model)
        return build_pipeline(self.args.work, model)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_training_args(parser, coarse=8.0, fine=11.0, batch=48, lr=1.5e-3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, saved = build_transformer(), torch.load(args.work / "latents.pt")
    words, pooled = embed(build_pipeline(args.work, model), [*saved["captions"], ""])
    trainer = DitTrainer({"words": words.half(), "pooled": pooled.half()}, model, args)
    if args.resume:
        trainer.resume()
    split = args.coarse / max(args.coarse + args.fine, 1e-9)
    if args.coarse:
        positions = model.pos_embed.pos_embed.clone()
        model.pos_embed.pos_embed.copy_(coarse_positions(positions))
        trainer.run(coarse_latents(saved["latents"]), args.coarse, (0.0, split), "coarse")
        model.pos_embed.pos_embed.copy_(positions)
    if args.fine:
        trainer.run(saved["latents"], args.fine, (split, 1.0), "fine")
    ship(trainer.save("last"), args.out)
    print(f"{len(trainer.losses)} steps, {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
