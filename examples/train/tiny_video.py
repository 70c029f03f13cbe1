"""Train the tiny Wan transformer on cached latents of clips and write the whole pipeline folder.

Flow matching, as tiny_dit.py: with sigma in 0..1, x = (1 - sigma) * latents + sigma * noise, the model predicts noise -
latents. Two stages: first on latents averaged over 2 x 2 of each frame (four times fewer tokens), then on whole ones.
The text encoder is not trained: its random weights tell words apart, and the transformer learns what they mean. The
pipeline fills prompts up with zeros to 512 tokens, which are all alike; training carries one for many, as tiny_dit.py.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from moving_scenes import FRAMES, SIDE, strip, vocabulary
from PIL import Image
from scenes import contact_sheet
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from training import Trainer, add_training_args, copy_weights, ship
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
from video_vae import CHANNELS

HEADS, HEAD_DIM, LAYERS = 4, 32, 5
TEXT = 64
MAX_LENGTH = 16  # tokens of a caption, and zeros
SHIFT = 3.0  # of the noise levels towards noise, in training and in the shipped scheduler
MOST_ZEROS = 512
SHEET_PROMPTS = (
    (Path(__file__).resolve().parents[2] / "otil_xdit/tools/eval/video_prompts.txt").read_text().splitlines()
)


# ---- models --------------------------------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or mark, and what ends a prompt, as T5 has it."""
    special = ("<pad>", "</s>", "<unk>")
    table = {word: number for number, word in enumerate((*special, *vocabulary()))}
    words = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", table["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MOST_ZEROS
    )


def build_text_encoder(words: int) -> UMT5EncoderModel:
    """Two layers of random weights."""
    sizes = {"d_model": TEXT, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    return UMT5EncoderModel(UMT5Config(vocab_size=words, feed_forward_proj="gated-gelu", **sizes)).eval()


def build_transformer() -> WanTransformer3DModel:
    """The shipped architecture; the last layer starts at zero."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT,
        freq_dim=128,
        ffn_dim=512,
        num_layers=LAYERS,
    )
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def build_pipeline(work: Path, transformer: WanTransformer3DModel, seed: int) -> WanPipeline:
    """The pipeline round a transformer, with what video_vae.py left in `work`."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = build_text_encoder(len(tokenizer))
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=AutoencoderKLWan.from_pretrained(work / "vae"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=transformer,
    )


@torch.no_grad()
def embed(pipeline: WanPipeline, captions: list[str]) -> torch.Tensor:
    """The pipeline's own embeddings, filled up with zeros, (n, MAX_LENGTH, TEXT)."""
    parts = [
        pipeline.encode_prompt(captions[begin : begin + 250], None, False, max_sequence_length=MAX_LENGTH)[0]
        for begin in tqdm(range(0, len(captions), 250), desc="embed")
    ]
    return torch.cat(parts)


class BiasedAttention(WanAttnProcessor):
    """Wan's attention with a bias on the keys of the text."""

    bias: torch.Tensor | None = None
    """(words,); of all layers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Any = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None and BiasedAttention.bias is not None:
            attention_mask = BiasedAttention.bias.view(1, 1, 1, -1)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


# ---- stages --------------------------------------------------------------------------------------------------------


def coarse(latents: torch.Tensor) -> torch.Tensor:
    """(n, c, frames, 16, 16) averaged to (n, c, frames, 8, 8), of unit deviation again."""
    pooled = functional.avg_pool3d(latents.float(), (1, 2, 2))
    return (pooled / pooled.std()).to(latents.dtype)


class CoarsePositions(torch.nn.Module):
    """Rotary positions of averaged latents: every other one of the whole latents' in each frame."""

    def __init__(self, rope: torch.nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Latents (n, c, frames, height, width); returns cosines and sines, (1, tokens, 1, d)."""
        frames, height, width = latents.shape[2:]
        whole = self.rope(latents.new_empty(1, 1, frames, 2 * height, 2 * width))
        return tuple(part.unflatten(1, (frames, height, width))[:, :, ::2, ::2].flatten(1, 3) for part in whole)


def noise_levels(batch: int) -> torch.Tensor:
    """Shifted logit-normal sigmas (batch,), one from each of `batch` equally likely strata."""
    normal = torch.special.ndtri((torch.arange(batch) + torch.rand(batch)).clamp(0.01) / batch)
    level = torch.sigmoid(normal)
    return SHIFT * level / (1 + (SHIFT - 1) * level)


class VideoTrainer(Trainer):
    """Flow matching; a tenth of the batch has the empty prompt."""

    def __init__(self, words: torch.Tensor, model: WanTransformer3DModel, args: argparse.Namespace) -> None:
        super().__init__(model, args)
        model.set_attn_processor(BiasedAttention())
        self.words = words

    def loss(self, latents: torch.Tensor) -> torch.Tensor:
        rows = torch.randint(len(latents), (self.args.batch,))
        texts = torch.where(torch.rand(len(rows)) < 0.1, len(self.words) - 1, rows)  # the last one is empty
        bias = torch.zeros(MAX_LENGTH)
        bias[-1] = math.log(MOST_ZEROS - MAX_LENGTH + 1)
        clean, sigma = latents[rows].float(), noise_levels(len(rows))
        noise, level = torch.randn_like(clean), sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * clean + level * noise
        # The CPU's flash attention takes two fifths of a step going backward.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            BiasedAttention.bias = bias.bfloat16()
            output = self.model(noisy, sigma * 1000, self.words[texts].float(), return_dict=False)[0]
            BiasedAttention.bias = None
        return functional.mse_loss(output.float(), noise - clean)

    def pipeline(self, average: list[torch.Tensor]) -> WanPipeline:
        model = build_transformer()
        copy_weights(average, model)
        return build_pipeline(self.args.work, model, self.args.seed)

    def sheet(self, pipeline: WanPipeline) -> Image.Image:
        clips = pipeline(
            SHEET_PROMPTS,
            height=SIDE,
            width=SIDE,
            num_frames=FRAMES,
            num_inference_steps=15,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).frames
        shown = np.stack([strip(clip) for clip in clips])
        return contact_sheet((shown * 255).round().astype(np.uint8), SHEET_PROMPTS, columns=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_training_args(parser, coarse=12.0, fine=24.0, batch=32, lr=1.5e-3)
    parser.set_defaults(work=Path("/tmp/tiny-video"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, saved = build_transformer(), torch.load(args.work / "latents.pt")
    words = embed(build_pipeline(args.work, model, args.seed), [*saved["captions"], ""])
    trainer = VideoTrainer(words.half(), model, args)
    if args.resume:
        trainer.resume()
    split = args.coarse / max(args.coarse + args.fine, 1e-9)
    if args.coarse:
        rope, model.rope = model.rope, CoarsePositions(model.rope)
        trainer.run(coarse(saved["latents"]), args.coarse, (0.0, split), "coarse")
        model.rope = rope
    if args.fine:
        trainer.run(saved["latents"], args.fine, (split, 1.0), "fine")
    ship(trainer.save("last"), args.out)
    print(f"{len(trainer.losses)} steps, {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
