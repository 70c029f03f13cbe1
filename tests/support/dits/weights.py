"""Random weights with which a network's output depends on every key and value."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

SEED = 1234
SHARP = re.compile(r"(to_q|to_k|add_q_proj|add_k_proj)\.weight$")


def seeded(module: nn.Module, sharpness: float = 2.0, norm_weight: float = 1.5) -> nn.Module:
    """Redraw every parameter of `module`, in place.

    The usual initialisation zeroes modulation and output layers and makes attention almost uniform; a wrong exchange
    would then hardly show. Here queries and keys are large enough for a peaked softmax, and nothing is zero.

    Args:
        module: what gets the weights.
        sharpness: how much larger than the other weights those of queries and keys are.
        norm_weight: the mean weight of normalisations.
    """
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                gain = sharpness if SHARP.search(name) else 1.0
                parameter.copy_(noise * gain / math.sqrt(parameter[0].numel()))
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(norm_weight + 0.2 * noise)
            else:
                parameter.copy_(0.1 * noise)
    return module.eval()


def noise(*shape: int, seed: int) -> torch.Tensor:
    """A fixed random tensor, for prompt embeddings."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ones(*shape: int) -> torch.Tensor:
    """A prompt mask in which every token counts."""
    return torch.ones(shape, dtype=torch.long)
