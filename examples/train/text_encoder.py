"""Build the closed-vocabulary CLIP tokenizer and pre-train two tiny CLIP text encoders on captions.

The encoders learn to say, from the pooled output, what stands at each place, and from each word's hidden state (the
last but one layer, which Stable Diffusion 3 uses) which shape it belongs to. Then they are frozen.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, sample, vocabulary
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

MAX_LENGTH = 24  # tokens of a prompt: a multiple of 2, 3, 4 and 8, as the sequence is cut over ranks
EXTRA_WORDS = ("the", "of", "one", "two", "photo", "image", "shape", "shapes", "with", "plain", "scene")
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
ATTRIBUTES = (tuple(SHAPES), tuple(COLOURS), tuple(SIZES), tuple(PLACES))  # of a Thing, in its fields' order


# ---- tokenizer -----------------------------------------------------------------------------------------------------


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes for bytes: printable Latin-1 as is, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def merge_word(pieces: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: apply the merge of lowest rank until none applies."""
    while known := [(merges[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in merges]:
        at = min(known)[1]
        pieces = [*pieces[:at], pieces[at] + pieces[at + 1], *pieces[at + 2 :]]
    return pieces


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges, in order of rank, that join each word into one token; later ones never undo earlier ones."""
    merges: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = merge_word([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = len(merges)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return list(merges)


def build_tokenizer() -> CLIPTokenizer:
    merges = learn_merges([*vocabulary(), *EXTRA_WORDS])
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *("".join(pair) for pair in merges), BEGIN, END]
    table = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=table, merges=merges, model_max_length=MAX_LENGTH)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """What transformers writes, plus the two files of older versions (vocab.json, merges.txt)."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")


# ---- encoder -------------------------------------------------------------------------------------------------------


def build_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def word_owners(scene: Scene) -> list[int]:
    """For every token position of the caption: which thing its word belongs to, -1 for none; length MAX_LENGTH."""
    owners = [-1]
    for i, thing in enumerate(scene.things):
        owners += [i] * len(thing.words().split()) + [-1]
    return (owners + [-1] * MAX_LENGTH)[:MAX_LENGTH]


def targets(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Class numbers, -100 where nothing is to be said.

    layout (n, places, 3): shape, colour, size at each place (the last class, 'none', is one past the names);
    background (n,); words (n, MAX_LENGTH, 4): shape, colour, size, place of the thing a word belongs to.
    """
    layout = np.tile([len(names) for names in ATTRIBUTES[:3]], (len(scenes), len(PLACES), 1))
    words = np.full((len(scenes), MAX_LENGTH, 4), -100)
    for row, scene in enumerate(scenes):
        fields = [[t.shape, t.colour, t.size, t.place] for t in scene.things]
        numbers = [[names.index(f) for names, f in zip(ATTRIBUTES, values, strict=True)] for values in fields]
        for thing in numbers:
            layout[row, thing[3]] = thing[:3]
        for column, owner in enumerate(word_owners(scene)):
            if owner >= 0:
                words[row, column] = numbers[owner]
    background = torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])
    return {"layout": torch.from_numpy(layout), "background": background, "words": torch.from_numpy(words)}


class Heads(nn.Module):
    """Linear read-outs used in pre-training only."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [len(names) for names in ATTRIBUTES]
        self.layout = nn.ModuleList(nn.Linear(64, len(PLACES) * (size + 1)) for size in sizes[:3])
        self.background = nn.Linear(64, len(BACKGROUNDS))
        self.words = nn.ModuleList(nn.Linear(64, size) for size in sizes)

    def forward(self, pooled: torch.Tensor, hidden: torch.Tensor, want: dict[str, torch.Tensor]) -> torch.Tensor:
        """The summed cross entropies for pooled (n, 64) and hidden (n, MAX_LENGTH, 64)."""
        loss = functional.cross_entropy(self.background(pooled), want["background"])
        for i, head in enumerate(self.layout):
            scores = head(pooled).view(len(pooled), len(PLACES), -1)
            loss = loss + functional.cross_entropy(scores.transpose(1, 2), want["layout"][..., i])
        for i, head in enumerate(self.words):
            loss = loss + functional.cross_entropy(head(hidden).transpose(1, 2), want["words"][..., i])
        return loss

    def accuracy(self, pooled: torch.Tensor, want: dict[str, torch.Tensor]) -> float:
        """The share of captions of which the whole scene is read right from the pooled output."""
        right = self.background(pooled).argmax(-1) == want["background"]
        for i, head in enumerate(self.layout):
            guess = head(pooled).view(len(pooled), len(PLACES), -1).argmax(-1)
            right &= (guess == want["layout"][..., i]).all(-1)
        return right.float().mean().item()


def tokenize(tokenizer: CLIPTokenizer, scenes: list[Scene]) -> torch.Tensor:
    texts = [scene.caption() for scene in scenes]
    return tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids


def train(model: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, args: argparse.Namespace, seed: int) -> float:
    """AdamW, cosine; returns the accuracy on fresh captions."""
    torch.manual_seed(seed)
    rng, heads = np.random.default_rng(seed), Heads()
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    for _ in (bar := tqdm(range(args.steps), desc=f"text encoder {seed}")):
        scenes = [sample(rng) for _ in range(args.batch)]
        output = model(tokenize(tokenizer, scenes), output_hidden_states=True)
        loss = heads(output.text_embeds, output.hidden_states[-2], targets(scenes))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    with torch.no_grad():
        scenes = [sample(rng) for _ in range(1000)]
        return heads.accuracy(model(tokenize(tokenizer, scenes)).text_embeds, targets(scenes))


@torch.no_grad()
def normalise(model: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer) -> None:
    """Scale the projection so that pooled outputs have about unit deviation, as the transformer likes its inputs."""
    rng = np.random.default_rng(0)
    pooled = model(tokenize(tokenizer, [sample(rng) for _ in range(500)])).text_embeds
    model.text_projection.weight /= pooled.std()


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny"), help="where tokenizer*/ and text_encoder*/ go")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer, start = build_tokenizer(), time.time()
    for i, suffix in enumerate(("", "_2")):
        torch.manual_seed(args.seed + i)
        model = build_encoder(tokenizer)
        accuracy = train(model, tokenizer, args, args.seed + i)
        normalise(model, tokenizer)
        model.save_pretrained(args.work / f"text_encoder{suffix}")
        save_tokenizer(tokenizer, args.work / f"tokenizer{suffix}")
        size = sum(p.numel() for p in model.parameters())
        print(f"text_encoder{suffix}: {size:,} parameters, {len(tokenizer)} tokens, scene read right {accuracy:.1%}")
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
