"""How xDiT 0.7 hands each transformer architecture its part of the tokens, by the class that diffusers gives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from otil_xdit.method.grid import TextPosition


@dataclass(frozen=True)
class Architecture:
    """What the exchange must know of a network.

    Attributes:
        rows: it is called with a rank's rows of the latent, [B, C, rows, cols]: sub-blocks are squares. Otherwise
            it is called with everybody's tokens and cuts them itself: sub-blocks are runs of tokens.
        text: where the text tokens stand in a rank's attention sequence.
        even: xDiT computes something else than one device does when these tokens cannot be shared out evenly.
        masks: which text masks xDiT reads: "any"; "alike", the same for every prompt of a batch; "none", where every
            token counts.
        refused: why it cannot run on patches at all; empty where it can.
        stages: whether it has been compared with one process under ``--parallel hybridiff``.
    """

    rows: bool = False
    text: TextPosition = "none"
    even: tuple[str, ...] = ()
    masks: Literal["any", "alike", "none"] = "any"
    refused: str = ""
    stages: bool = False


CAUSAL = "it makes a video part by part from the keys of earlier parts, and xDiT runs that on one device"

ARCHITECTURES: dict[str, Architecture] = {
    "SD3Transformer2DModel": Architecture(rows=True, text="rear", stages=True),
    "PixArtTransformer2DModel": Architecture(rows=True, stages=True),
    "HunyuanDiT2DModel": Architecture(rows=True, stages=True),
    "FluxTransformer2DModel": Architecture(text="front", even=("text", "image")),
    "Flux2Transformer2DModel": Architecture(text="front", even=("text", "image")),
    "QwenImageTransformer2DModel": Architecture(text="front", even=("text", "image"), masks="none"),
    "WanTransformer3DModel": Architecture(even=("image",)),
    "WanVACETransformer3DModel": Architecture(even=("image",)),
    "HunyuanVideoTransformer3DModel": Architecture(even=("image",), masks="alike"),
    "HunyuanVideo15Transformer3DModel": Architecture(even=("image",), masks="alike"),
    "CogVideoXTransformer3DModel": Architecture(),
    "ConsisIDTransformer3DModel": Architecture(),
    "LTX2VideoTransformer3DModel": Architecture(even=("image",)),
    "Ideogram4Transformer2DModel": Architecture(even=("image",)),
    "ZImageTransformer2DModel": Architecture(even=("text", "image")),
    "xFuserCausalWanTransformer3DWrapper": Architecture(refused=CAUSAL),
    "Cosmos3OmniTransformer": Architecture(
        refused="xDiT hands every rank a copy of the text's keys, and each copy would be attended to"
    ),
    "LatteTransformer3DModel": Architecture(
        refused="xDiT lets its temporal blocks attend to the tokens of another place than their own"
    ),
    "SanaTransformer2DModel": Architecture(
        refused="its self-attention is linear and sends no keys and values, and its cross-attention would gather the "
        "text once from every rank"
    ),
}
"""By class name. A network that has no entry is refused, unless the user allows what nobody has compared."""

UNTESTED = "nobody has compared it with one process, and it may compute something else; --allow_untested tries it"

UNKNOWN = Architecture()
