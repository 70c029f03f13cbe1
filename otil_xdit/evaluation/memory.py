"""`otil-xdit memory`: how many bytes a rank keeps for the exchange. Nothing is computed: all tensors are on "meta".

The figures are read from the layers that a run would make, which are made here and called twice: nothing is estimated.

Shapes: N ranks, B batch, S tokens of one rank, C features.
"""

from __future__ import annotations

import importlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from otil_xdit.config import OtilConfig
from otil_xdit.dit.layouts import architecture_of
from otil_xdit.evaluation.models import find_model
from otil_xdit.exchange import PatchGroup
from otil_xdit.grid import LevelGrid, TokenLayout
from otil_xdit.kv import KVStack
from otil_xdit.picking import Picker
from otil_xdit.schedule import Clock, Mode
from otil_xdit.unet.patches import is_unet
from otil_xdit.unet.structure import Levels, check_supported
from otil_xdit.workspace import Workspace

META = torch.device("meta")


@dataclass(frozen=True)
class Network:
    """A denoising network without weights.

    Attributes:
        name: as the user gave it.
        module: of diffusers, on the meta device.
        vae: image pixels of a latent pixel, per side.
        patch: latent pixels of a token, per side; 1 for a U-Net.
        batch: images in one pass, unless the user says otherwise: 2 with classifier-free guidance.
    """

    name: str
    module: Any
    vae: int
    patch: int = 1
    batch: int = 2


@dataclass(frozen=True)
class Layer:
    """What the exchange sees of a self-attention layer: `tokens` of one rank, `width` features, how they are laid."""

    tokens: int
    width: int
    layout: TokenLayout


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank; `largest` is of one layer, all others are of all layers.

    `values`, `velocities` (with the ages of tokens) and `buffers` (payloads to send and received) make up `total`;
    `rooms` are what all layers use in turn, by name.
    """

    largest: int
    values: int
    velocities: int
    buffers: int
    rooms: dict[str, int]

    @property
    def total(self) -> int:
        return self.values + self.velocities + self.buffers


_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "SDXL": (
        "UNet2DConditionModel",
        {
            "down_block_types": ("DownBlock2D", _CROSS_DOWN, _CROSS_DOWN),
            "up_block_types": (_CROSS_UP, _CROSS_UP, "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {"vae": 8},
    ),
    "SD1.5": ("UNet2DConditionModel", {"attention_head_dim": 8, "cross_attention_dim": 768}, {"vae": 8}),
    # Its guidance is distilled: one pass for each image. The pipeline packs 2 x 2 latent pixels into a token.
    "FLUX": ("FluxTransformer2DModel", {}, {"vae": 8, "patch": 2, "batch": 1}),
}
"""By name: class in diffusers, settings of the published config that are not that class's defaults, facts."""


def find_network(name: str) -> Network:
    """A published network, or that of a shipped model or of a folder in diffusers format; only json files are read.

    Raises:
        ValueError: naming what is accepted.
    """
    if name in PUBLISHED:
        kind, settings, facts = PUBLISHED[name]
        return Network(name, _empty(kind, settings), **facts)
    try:
        model = find_model(name)
    except ValueError as error:
        raise ValueError(f"{error}; published networks are {', '.join(PUBLISHED)}") from error
    config = Path(model.folder) / ("unet" if model.is_unet else "transformer") / "config.json"
    settings = json.loads(config.read_text())
    known = {setting: value for setting, value in settings.items() if not setting.startswith("_")}
    return Network(model.label, _empty(settings["_class_name"], known), model.vae, model.patch)


def attention_layers(network: Network, size: int, ranks: int, text: int) -> list[Layer]:
    """The self-attention layers of a network in the order in which they are called.

    Args:
        network: the network.
        size: of the square picture, in pixels.
        ranks: that share it by rows.
        text: text tokens of a DiT; a U-Net's self-attention has none.

    Raises:
        ValueError: for a picture that so many ranks cannot share.
    """
    step = network.vae * network.patch
    if size < step or size % step:
        raise ValueError(f"--size {size} is not possible with {network.name}; give a multiple of {step}")
    find = _unet_layers if is_unet(network.module) else _dit_layers
    try:
        return list(find(network, size // step, ranks, text))
    except ValueError as error:
        raise ValueError(f"--size {size} on {ranks} ranks with {network.name}: {error}") from error


def memory_of(layers: Sequence[Layer], ranks: int, batch: int, dtype: torch.dtype, config: OtilConfig) -> Memory:
    """What one rank keeps for these layers under `config`, after a synchronous step and another one."""
    largest, kept, room = 0, Counter[str](), Workspace(META)
    for stack in _stacks(layers, ranks, batch, dtype, config, room):
        count = len(stack.names)
        largest = max(largest, stack.nbytes // count)
        values, *velocities = (count * tensor.nbytes for tensor in stack.shared_state(0))
        kept["values"] += values
        kept["velocities"] += sum(velocities)
        kept["buffers"] += stack.nbytes - values - sum(velocities)
    return Memory(largest, kept["values"], kept["velocities"], kept["buffers"], room.sizes)


def _empty(kind: str, settings: dict[str, Any]) -> nn.Module:
    with META:
        made: nn.Module = getattr(importlib.import_module("diffusers"), kind)(**settings)
    return made


def _unet_layers(network: Network, side: int, ranks: int, _: int) -> Iterator[Layer]:
    """As `otil_xdit.unet.patches.UnetPatches.attend` calls them."""
    check_supported(network.module)
    levels = Levels(network.module)
    grid = LevelGrid.build(side, side, levels.count, ranks)
    # A module holds its blocks as down, up, mid.
    in_order = sorted(network.module.named_modules(), key=lambda found: found[0].split("_")[0])
    for path, attention in in_order:
        if isinstance(attention, Attention) and not attention.is_cross_attention:
            level = levels.of(path)
            layout = TokenLayout(max(grid.rows[level]), grid.widths[level], 2**level)
            yield Layer(layout.image_tokens, attention.inner_kv_dim, layout)


def _dit_layers(network: Network, side: int, ranks: int, text: int) -> Iterator[Layer]:
    """As xDiT calls them: each rank has its share of the image's tokens, and of the text's, which xDiT fills up."""
    facts = architecture_of(network.module)
    shared = side if facts.rows else side * side
    if shared % ranks or ("text" in facts.even and text % ranks):
        image = f"{side} rows of tokens" if facts.rows else f"{shared} image tokens"
        raise ValueError(f"{image} and {text} text tokens cannot be shared evenly; give other --size or --text_tokens")
    image_tokens = side * side // ranks
    for path, attention in network.module.named_modules():
        if hasattr(attention, "processor") and hasattr(attention, "to_k"):
            # SD3.5's second attention of a block sees the image alone.
            texts = 0 if path.endswith("attn2") else math.ceil(text / ranks)
            layout = TokenLayout(side // ranks, side, network.patch, facts.text) if facts.rows else TokenLayout()
            yield Layer(image_tokens + texts, attention.to_k.out_features, layout)


def _stacks(
    layers: Sequence[Layer], ranks: int, batch: int, dtype: torch.dtype, config: OtilConfig, room: Workspace
) -> list[KVStack]:
    """The layers' stacks after two steps, as `otil_xdit.run.OtilRun` makes them."""
    nowhere, made = _Nowhere(ranks), list[KVStack]()
    picker = Picker(config, Clock(), nowhere.group)
    for number, layer in enumerate(layers):
        picker.observe(None, layer.layout)
        shape, table = torch.Size((2, batch, layer.tokens, layer.width)), picker.table(layer.tokens, META)
        if not made or not made[-1].fits(shape, dtype, table):
            exchange: Any = nowhere  # it has what stacks ask of one
            made.append(KVStack(exchange, shape, dtype, table, config, picker, room))
        made[-1].join(str(number))
    for stack in made:
        _, batch, tokens, width = stack.shape
        values = torch.empty(batch, 1, tokens, width, dtype=dtype, device=META)
        modes: list[Mode] = (
            ["sync", "sync", config.freshness] if config.warmup_steps > 1 else ["sync", config.freshness]
        )
        for mode in modes:
            for place in range(len(stack.names)):
                stack.gather(place, values, values, mode, 0, "kv")
            stack.seal()
        stack.drain()
    return made


class _Nowhere:
    """An exchange whose messages arrive at once and hold nothing."""

    def __init__(self, ranks: int) -> None:
        nobody: Any = None
        self.group = PatchGroup(nobody, 0, ranks)

    def all_gather(self, payload: torch.Tensor, output: torch.Tensor, kind: str, where: str) -> _Arrived:
        return _Arrived(output)


@dataclass(frozen=True)
class _Arrived:
    output: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.output
