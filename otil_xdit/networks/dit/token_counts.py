"""How many tokens a transformer's call has, and which of them are real, by the way it is called.

Shapes: B samples, S tokens, C channels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

_LIST_STEP = 32
"""Z-Image fills every caption and every image up with learned tokens to multiples of this."""


@dataclass(frozen=True)
class Tokens:
    """Tokens that the ranks share.

    Attributes:
        count: of every sample, with what fills shorter ones up.
        real: int64, of each sample the positions of those that may be attended to; None where all may be.
        frame: how many of them a frame of a video has.
    """

    count: int
    real: tuple[torch.Tensor, ...] | None = None
    frame: int = 1

    def with_frames(self, ranks: int) -> Tokens:
        """Return the tokens with as many more frames as make the ranks divide them."""
        more = missing_frames(self.count // self.frame, self.frame, ranks)
        if more == 0:
            return self
        return Tokens(self.count + more * self.frame, (torch.arange(self.count),), self.frame)


def missing_frames(frames: int, tokens: int, ranks: int) -> int:
    """Return how many more frames of `tokens` tokens are needed until `ranks` divide the tokens of all."""
    return -frames % (ranks // math.gcd(tokens, ranks))


class Rows(NamedTuple):
    """Rows of latent pixels: of the image, and with those that fill it up until the ranks divide them."""

    real: int
    filled: int


Counts = Mapping[str, Tokens]
"""By what the tokens are: "text", "image", "whole"."""


def count_tokens(
    network: nn.Module, call: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], cfg: tuple[int, int]
) -> Counts:
    """Count the tokens of a network's call.

    Args:
        network: a diffusers model or xDiT's wrapper of one.
        call: how it is called; see `otil_xdit.catalog.architectures.Call`.
        args, kwargs: what it is called with.
        cfg: rank and number of those that share the samples, where xDiT shares them out inside the network.
    """
    if not call:
        return {}
    return _COUNTERS[call](network, _arguments(type(network), args, kwargs), cfg)


def count_rows(network: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: Rows, ranks: int) -> Counts:
    """Count the tokens of all ranks of a network that is called with a rank's rows; `count_tokens` looks at others.

    Args:
        network, args, kwargs: xDiT's wrapper of a diffusers model, and what it is called with.
        rows: of all ranks.
        ranks: that share them.
    """
    latent, config = _arguments(type(network), args, kwargs)["hidden_states"], network.config
    side, frames = config.patch_size, 1
    if latent.dim() == 5:  # a video, [B, frames, C, rows, cols]
        frames = latent.shape[1] // (getattr(config, "patch_size_t", None) or 1)
    cols, real, each = latent.shape[-1] // side, rows.real // side, rows.filled // side // ranks
    frame, row, col = torch.meshgrid(*map(torch.arange, (frames, real, cols)), indexing="ij")
    share = frames * each * cols
    places = row // each * share + frame * each * cols + row % each * cols + col
    return {"image": Tokens(share * ranks, (places.flatten().sort().values,))}


def _arguments(kind: type[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**dict(zip(_positional(kind.forward), args, strict=False)), **kwargs}


@cache
def _positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments of a network's class's `forward`, without the network."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(forward).parameters.values()
    return tuple(one.name for one in parameters if one.kind in kinds)[1:]


def _packed(network: Any, given: Mapping[str, Any], cfg: tuple[int, int]) -> Counts:
    """Of packed latents, [B, S, C], and text, [B, S, C], which may have a mask."""
    image, text = given["hidden_states"].shape[1], given.get("encoder_hidden_states")
    if text is None:
        return {"image": Tokens(image)}
    mask = given.get("encoder_hidden_states_mask")
    real = None if mask is None or bool(mask.all()) else tuple(row.nonzero().flatten() for row in mask)
    count = text.shape[1]
    return {"image": Tokens(image), "text": Tokens(count, real), "whole": Tokens(count + image)}


def _video(network: Any, given: Mapping[str, Any], cfg: tuple[int, int]) -> Counts:
    """Of a video's latents, [B, C, frames, rows, cols]."""
    config = network.config
    side = config.patch_size
    sides = tuple(side) if isinstance(side, (tuple, list)) else (config.patch_size_t, side, side)
    frames, *frame = (size // side for size, side in zip(given["hidden_states"].shape[2:], sides, strict=True))
    return {"image": Tokens(frames * math.prod(frame), frame=math.prod(frame))}


def _lists(network: Any, given: Mapping[str, Any], cfg: tuple[int, int]) -> Counts:
    """Of Z-Image: a list of latents, [C, frames, rows, cols], and one of captions, [S, C].

    Shorter ones are filled up to the longest, which attention must not see.
    """
    side, frames = given.get("patch_size", 2), given.get("f_patch_size", 1)
    images, texts = (_share(given[name], cfg) for name in ("x", "cap_feats"))
    image = [_filled(latent[0].numel() // (side * side * frames)) for latent in images]
    text = [_filled(len(caption)) for caption in texts]
    whole = [sum(pair) for pair in zip(image, text, strict=True)]
    return {"image": _ragged(image), "text": _ragged(text), "whole": _ragged(whole)}


def _share(samples: list[torch.Tensor], cfg: tuple[int, int]) -> list[torch.Tensor]:
    rank, ranks = cfg
    each = len(samples) // ranks
    return samples[rank * each : (rank + 1) * each]


def _filled(count: int) -> int:
    return -(-count // _LIST_STEP) * _LIST_STEP


def _ragged(counts: list[int]) -> Tokens:
    """Return tokens of samples that are filled up to the longest."""
    if len(set(counts)) == 1:
        return Tokens(counts[0])
    return Tokens(max(counts), tuple(torch.arange(count) for count in counts))


def _cosmos3(network: Any, given: Mapping[str, Any], cfg: tuple[int, int]) -> Counts:
    """Of Cosmos 3, whose sequence has the text first and all that is generated behind it."""
    text = int(given["und_len"])
    return {"text": Tokens(text), "image": Tokens(int(given["sequence_length"]) - text)}


def _ideogram4(network: Any, given: Mapping[str, Any], cfg: tuple[int, int]) -> Counts:
    """Of Ideogram 4, whose padding xDiT leaves out before it cuts the sequence."""
    _, text, image = network._get_sequence_layout(given["indicator"])
    return {"whole": Tokens(text + image)}


_COUNTERS: dict[str, Callable[[Any, Mapping[str, Any], tuple[int, int]], Counts]] = {
    "packed": _packed,
    "video": _video,
    "lists": _lists,
    "cosmos3": _cosmos3,
    "ideogram4": _ideogram4,
}
