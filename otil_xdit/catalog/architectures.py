"""How xDiT 0.7 hands each transformer architecture its part of the tokens, by the class that diffusers gives it.

`ARCHITECTURES` is the one table: from it follow which keys are padding or copies (`otil_xdit.networks.dit.key_plan`),
which sizes are refused before weights load (`otil_xdit.catalog.geometry`) and what the tools reckon with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from otil_xdit.method.grid import TextPosition

Cut = Literal["padded", "frames", "split", "joint", "replicated"]
"""How N ranks share tokens. "padded": filled up with zeros to a multiple of N. "frames": filled up with whole
frames of a video. "split": evenly where N divides them, otherwise a copy for every rank. "joint": the same, but a copy
stays out of the sequence, as xDiT hands it to attention beside it. "replicated": a copy for every rank."""

Call = Literal["", "rows", "packed", "video", "lists", "cosmos3", "ideogram4"]
"""How a network is called, which says where the numbers of its tokens stand (`otil_xdit.networks.dit.token_counts`)."""


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of an attention sequence.

    Attributes:
        tokens: what they are; "whole" is text and image in one.
        cut: how the ranks share them.
    """

    tokens: Literal["text", "image", "whole"]
    cut: Cut = "padded"


Sequence = tuple[Part, ...]

PADDED_IMAGE: Sequence = (Part("image"),)
PADDED_WHOLE: Sequence = (Part("whole"),)


@dataclass(frozen=True)
class Architecture:
    """What the exchange must know of a network.

    Attributes:
        rows: it is called with a rank's rows of the latent, [B, C, rows, cols]: sub-blocks are squares. Otherwise
            it is called with everybody's tokens and cuts them itself: sub-blocks are runs of tokens.
        text: where the text tokens stand in a rank's attention sequence.
        call: how it is called; "rows" with a rank's rows of the latent, which xDiT's pipeline shares out; empty where
            it is not looked at.
        sequences: what the keys of its attention layers are made of, by a word of the layer's path; "" for the others.
        gathered: words of the paths of layers for which xDiT itself gathers the keys, and pads them like the image.
        joins: tokens that xDiT puts together again from all ranks in a call of the network, in turn.
        masks: which text masks xDiT reads: "any"; "alike", the same for every prompt of a batch.
        whole_masks: its masks cover the keys of all ranks.
        refused: why it cannot run on patches at all; empty where it can.
        refused_settings: settings of its configuration that xDiT does not read, and why they cannot be used.
        stages: whether it has been compared with one process under ``--parallel hybridiff``.
        step_caches: whether it has been compared with one process where both have a step cache; its blocks are then
            called with the image's tokens.
    """

    rows: bool = False
    text: TextPosition = "none"
    call: Call = ""
    sequences: Mapping[str, Sequence] = field(default_factory=dict)
    gathered: tuple[str, ...] = ()
    joins: tuple[str, ...] = ("image",)
    masks: Literal["any", "alike"] = "any"
    whole_masks: bool = False
    refused: str = ""
    refused_settings: Mapping[str, str] = field(default_factory=dict)
    stages: bool = False
    step_caches: bool = False

    @property
    def why_equal_shares(self) -> str:
        """Say why all ranks have equally many tokens; empty where they may have unequal shares."""
        if self.call == "rows":
            return "xDiT's pipeline gives every rank equally many rows of it"
        return "" if self.call else "xDiT cuts its tokens evenly, in a way of its own"

    @property
    def why_equal_compiled(self) -> str:
        """Say why a compiled network's ranks have equally many tokens; empty where they may have unequal shares."""
        joint = any(part.cut == "joint" for parts in self.sequences.values() for part in parts)
        return "how many tokens its text has is not known in a graph of torch.compile" if joint else ""

    def fills_frames(self, tokens: str) -> bool:
        """Return whether whole frames fill these tokens up until the ranks divide them."""
        parts = [part for parts in self.sequences.values() for part in parts]
        return any(part.cut == "frames" for part in parts if part.tokens == tokens)

    def sends_text(self, text: int, ranks: int) -> bool:
        """Return whether a rank sends the keys of its share of `text` tokens: not where all have a copy."""
        parts = [part for parts in self.sequences.values() for part in parts if part.tokens == "text"]
        return not any(part.cut == "replicated" or (part.cut == "split" and text % ranks) for part in parts)


CAUSAL = "it makes a video part by part from the keys of earlier parts, and xDiT runs that on one device"

ARCHITECTURES: dict[str, Architecture] = {
    "SD3Transformer2DModel": Architecture(
        rows=True, text="rear", call="rows", sequences={"": (Part("image"), Part("text", "joint"))}, stages=True
    ),
    "PixArtTransformer2DModel": Architecture(rows=True, call="rows", sequences={"": PADDED_IMAGE}, stages=True),
    "HunyuanDiT2DModel": Architecture(rows=True, call="rows", sequences={"": PADDED_IMAGE}, stages=True),
    "CogVideoXTransformer3DModel": Architecture(call="rows", sequences={"": (Part("text", "joint"), Part("image"))}),
    "ConsisIDTransformer3DModel": Architecture(call="rows", sequences={"": (Part("text", "joint"), Part("image"))}),
    "FluxTransformer2DModel": Architecture(
        text="front", call="packed", sequences={"": (Part("text", "split"), Part("image"))}, step_caches=True
    ),
    "Flux2Transformer2DModel": Architecture(
        text="front", call="packed", sequences={"": (Part("text"), Part("image"))}, step_caches=True
    ),
    "QwenImageTransformer2DModel": Architecture(
        text="front", call="packed", sequences={"": (Part("text"), Part("image"))}, step_caches=True
    ),
    "ZImageTransformer2DModel": Architecture(
        call="lists",
        sequences={"": PADDED_WHOLE, "noise_refiner": PADDED_IMAGE, "context_refiner": (Part("text"),)},
        joins=("image", "text", "whole"),
    ),
    "WanTransformer3DModel": Architecture(call="video", sequences={"": PADDED_IMAGE}, step_caches=True),
    "WanVACETransformer3DModel": Architecture(call="video", sequences={"": PADDED_IMAGE}),
    "HunyuanVideoTransformer3DModel": Architecture(
        call="video",
        sequences={"": (Part("image", "frames"), Part("text", "joint"))},
        masks="alike",
        step_caches=True,
    ),
    "HunyuanVideo15Transformer3DModel": Architecture(
        call="video", sequences={"": (Part("image"), Part("text", "joint"))}, masks="alike"
    ),
    "LTX2VideoTransformer3DModel": Architecture(
        call="packed", sequences={"": PADDED_IMAGE}, gathered=("video_to_audio_attn",)
    ),
    "Ideogram4Transformer2DModel": Architecture(call="ideogram4", sequences={"": PADDED_WHOLE}, joins=("whole",)),
    "Cosmos3OmniTransformer": Architecture(
        call="cosmos3",
        sequences={"": (Part("text", "replicated"), Part("image"))},
        refused_settings={"use_und_k_norm_for_gen": "xDiT leaves out the norm of the text's keys that it asks for"},
    ),
    "Lumina2Transformer2DModel": Architecture(whole_masks=True),
    "Krea2Transformer2DModel": Architecture(
        call="packed", sequences={"": PADDED_WHOLE}, joins=("whole",), whole_masks=True
    ),
    "xFuserCausalWanTransformer3DWrapper": Architecture(refused=CAUSAL),
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
