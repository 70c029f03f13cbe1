"""How xDiT 0.7 hands each transformer architecture its part of the tokens, by the class that diffusers gives it."""

from __future__ import annotations

from dataclasses import dataclass

from otil_xdit.method.grid import TextPosition


@dataclass(frozen=True)
class Architecture:
    """What the exchange must know of a network.

    Attributes:
        rows: it is called with a rank's rows of the latent, [B, C, rows, cols]: sub-blocks are squares. Otherwise
            it is called with everybody's tokens and cuts them itself: sub-blocks are runs of tokens.
        text: where the text tokens stand in a rank's attention sequence.
        even: xDiT computes something else than one device does when these tokens cannot be shared out evenly.
        refused: why it cannot run on patches at all; empty where it can.
        stages: whether it has been compared with one process under ``--parallel hybridiff``.
    """

    rows: bool = False
    text: TextPosition = "none"
    even: tuple[str, ...] = ()
    refused: str = ""
    stages: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "SD3Transformer2DModel": Architecture(rows=True, text="rear", stages=True),
    "PixArtTransformer2DModel": Architecture(rows=True, stages=True),
    "HunyuanDiT2DModel": Architecture(rows=True, stages=True),
    "FluxTransformer2DModel": Architecture(text="front", even=("text", "image")),
    "Flux2Transformer2DModel": Architecture(text="front", even=("text", "image")),
    "QwenImageTransformer2DModel": Architecture(text="front", even=("text", "image")),
    "WanTransformer3DModel": Architecture(even=("image",)),
    "LatteTransformer3DModel": Architecture(
        refused="xDiT lets its temporal blocks attend to the tokens of another place than their own"
    ),
    "SanaTransformer2DModel": Architecture(
        refused="its self-attention is linear and sends no keys and values, and its cross-attention would gather the "
        "text once from every rank"
    ),
}
"""Architectures that differ from packed tokens which xDiT fills up, which is what an unknown one is taken for."""

UNKNOWN = Architecture()
