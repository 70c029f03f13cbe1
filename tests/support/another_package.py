"""What another package brings: a codec and a change score, each a class or function and an entry in a dict."""

from __future__ import annotations

import torch

from otil_xdit.method.codec import Codec, Decoded
from otil_xdit.method.codecs import CODECS
from otil_xdit.method.scores import CHANGE_SCORES, ChangeScore
from otil_xdit.method.scratch import ScratchBuffers


class Half(Codec):
    """Two bytes a number, without scales; counts the bytes that it writes."""

    bits = 16
    written = 0

    def __init__(self, of_residuals: bool) -> None:
        self.of_residuals = of_residuals

    def size(self, vectors: int, width: int) -> int:
        return 2 * vectors * width

    def encode(self, vectors: torch.Tensor, out: torch.Tensor, scratch: ScratchBuffers) -> None:
        out.view(torch.float16).unflatten(-1, vectors.shape[-2:]).copy_(vectors)
        Half.written += out.nbytes

    def decode(self, coded: torch.Tensor, vectors: int, width: int, scratch: ScratchBuffers) -> Decoded:
        return coded.view(torch.float16).unflatten(-1, (vectors, width)).float(), None


def first_number_change(fresh: torch.Tensor, previous: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """How far the first number of each sub-block's first token has moved."""
    return (fresh.float() - previous.float()).flatten(0, -3)[0, table[:, 0], 0].abs()


def register() -> None:
    """In a rank's own process, so that nothing has to be undone."""
    CODECS["half"] = lambda dtype: Half(of_residuals=True)
    CODECS["half-values"] = lambda dtype: Half(of_residuals=False)
    CHANGE_SCORES["first"] = ChangeScore(first_number_change)
