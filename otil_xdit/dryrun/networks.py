"""Networks without weights: published ones, shipped ones, folders; and the self-attention layers of each.

Everything is on PyTorch's "meta" device, where tensors have shapes and no storage, so size costs nothing.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.models.attention_processor import Attention
from torch import nn

from otil_xdit.catalog.folders import find_model
from otil_xdit.catalog.models import published_networks
from otil_xdit.method.grid import LevelGrid, TokenLayout
from otil_xdit.networks.dit.architectures import architecture_of
from otil_xdit.networks.dit.token_cut import TokenCut
from otil_xdit.networks.unet.compatibility import check_supported
from otil_xdit.networks.unet.levels import Levels
from otil_xdit.networks.unet.model import is_unet

META = torch.device("meta")

T5_TOKENS = 256
"""Of SD3: `max_sequence_length` of diffusers' pipeline unless the user says otherwise."""


@dataclass(frozen=True)
class Network:
    """A denoising network without weights.

    Attributes:
        name: as the user gave it.
        module: of diffusers, on the meta device.
        vae: image pixels of a latent pixel, per side.
        patch: latent pixels of a token, per side; 1 for a U-Net.
        batch: images in one pass for an image: 2 with classifier-free guidance.
        text: tokens of text in a pass, unless the user says otherwise.
        controls: ControlNets of the U-Net, by their names in a pipeline.
    """

    name: str
    module: Any
    vae: int
    patch: int = 1
    batch: int = 2
    text: int = 77
    controls: Mapping[str, Any] = field(default_factory=dict, hash=False)  # a mapping has no hash

    @property
    def is_unet(self) -> bool:
        return is_unet(self.module)

    @property
    def pixels(self) -> int:
        """Image pixels of a token (of a U-Net: of a latent pixel), per side."""
        return self.vae * self.patch


@dataclass(frozen=True)
class Layer:
    """What the exchange sees of a self-attention layer.

    Attributes:
        tokens: of one rank.
        width: features of a token, of all heads.
        heads: their number.
        layout: how the tokens are laid.
        path: of the layer's module.
    """

    tokens: int
    width: int
    heads: int
    layout: TokenLayout
    path: str = ""


def find_network(name: str, times: int = 1) -> Network:
    """Build a published network, or that of a shipped model or of a folder in diffusers format, from json files alone.

    Args:
        name: of a model, or a folder.
        times: as wide as it is, as `otil-xdit bench --width` has it; not of published ones.

    Raises:
        ValueError: naming what is accepted.
    """
    published = published_networks()
    if name in published:
        record = published[name]
        config = record.network
        assert config is not None, "published networks have one"
        module = _empty(config.kind, dict(config.settings))
        return Network(name, module, record.vae, record.patch, config.passes, config.text_tokens)
    try:
        model = find_model(name)
    except ValueError as error:
        raise ValueError(f"{error}; published networks are {', '.join(published)}") from error
    file = Path(model.folder) / ("unet" if model.is_unet else "transformer") / "config.json"
    settings = json.loads(file.read_text())
    known = {setting: value for setting, value in settings.items() if not setting.startswith("_")}
    module = _empty(settings["_class_name"], known if times == 1 else wider_settings(known, times))
    return Network(model.label, module, model.vae, model.patch, text=_text_tokens(Path(model.folder), model.is_unet))


def with_controlnets(network: Network, count: int) -> Network:
    """Return a U-Net with so many ControlNets, each a copy of its encoder, as those that are published are.

    Raises:
        ValueError: for a network that is no U-Net, and a number below 0.
    """
    if count < 0 or (count and not network.is_unet):
        raise ValueError(f"--controlnets {count} with {network.name}; give 0 or more, and more than 0 for U-Nets only")
    names = ["controlnet"] if count == 1 else [f"controlnet.nets.{number}" for number in range(count)]
    with META:
        made = [ControlNetModel.from_unet(network.module, load_weights_from_unet=False) for _ in names]
    return replace(network, controls=dict(zip(names, made, strict=True)))


def wider_settings(settings: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Return the config of a network `times` as wide.

    A U-Net gets all channels that many times, and as many heads as before but at least `times`. A DiT gets `times` as
    many heads of the width that they had.
    """
    if "block_out_channels" not in settings:
        heads = times * settings["num_attention_heads"]
        width = heads * settings["attention_head_dim"]
        return {**settings, "num_attention_heads": heads, "caption_projection_dim": width}
    channels = [times * count for count in settings["block_out_channels"]]
    heads = settings["attention_head_dim"]  # diffusers' U-Nets keep the number of heads under this name
    several = isinstance(heads, (list, tuple))
    heads = [max(count, times) for count in heads] if several else max(heads, times)
    return {**settings, "block_out_channels": channels, "attention_head_dim": heads}


def _text_tokens(folder: Path, is_unet: bool) -> int:
    """Return the text tokens of a model in a folder: CLIP's, and in SD3 also T5's, which diffusers fills with zeros."""
    settings = folder / "tokenizer" / "tokenizer_config.json"
    length = int(json.loads(settings.read_text())["model_max_length"]) if settings.is_file() else 77
    return length if is_unet else length + T5_TOKENS


def attention_layers(network: Network, height: int, width: int, cut: TokenCut, text: int) -> list[Layer]:
    """List the self-attention layers of a network in the order in which they are called.

    Args:
        network: the network.
        height, width: of the image, in pixels.
        cut: of rows or tokens among the ranks; a layer has the tokens of the rank that has most.
        text: text tokens of a DiT; a U-Net's self-attention has none.

    Raises:
        ValueError: for an image that so many ranks cannot share.
    """
    check_size(network, height, width)
    rows, cols = height // network.pixels, width // network.pixels
    try:
        if network.is_unet:
            return list(_unet_layers(network, rows, cols, cut))
        return list(_dit_layers(network, rows, cols, cut, text))
    except ValueError as error:
        raise ValueError(f"{_size(height, width)} on {cut.ranks} ranks with {network.name}: {error}") from error


def check_size(network: Network, height: int, width: int) -> None:
    """Refuse an image that is not a whole number of tokens (of a U-Net: of latent pixels).

    Raises:
        ValueError: naming what would be accepted.
    """
    step = network.pixels
    if min(height, width) < step or height % step or width % step:
        raise ValueError(f"{_size(height, width)} is not possible with {network.name}; give a multiple of {step}")


def _size(height: int, width: int) -> str:
    return f"--size {height}" if height == width else f"--height {height} --width {width}"


def _empty(kind: str, settings: dict[str, Any]) -> nn.Module:
    with META:
        made: nn.Module = getattr(importlib.import_module("diffusers"), kind)(**settings)
    return made


def _unet_layers(network: Network, rows: int, cols: int, cut: TokenCut) -> Iterator[Layer]:
    """Yield them as `otil_xdit.networks.unet.model.PatchedUNet.attend` calls them."""
    for module in (*network.controls.values(), network.module):
        check_supported(module)
        levels = Levels(module)
        grid = LevelGrid.build(rows, cols, levels.count, cut.ranks, cut.rank_shares)
        # A U-Net holds its blocks as down, up, mid.
        called = sorted(module.named_modules(), key=lambda found: found[0].split("_")[0])
        for path, attention in called:
            if isinstance(attention, Attention) and not attention.is_cross_attention:
                level = levels.of(path)
                layout = TokenLayout(max(grid.rows[level]), grid.widths[level], 2**level)
                yield Layer(layout.image_tokens, attention.inner_kv_dim, attention.heads, layout, path)


def _dit_layers(network: Network, rows: int, cols: int, cut: TokenCut, text: int) -> Iterator[Layer]:
    """Yield them as xDiT calls them: a rank has its share of the image's tokens, and of the text's, which xDiT pads."""
    facts, ranks = architecture_of(network.module), cut.ranks
    if cut.shares and facts.why_equal_shares:
        raise ValueError(f"--patch_shares is not possible: {facts.why_equal_shares}")
    if facts.rows and rows % ranks:
        raise ValueError(f"{rows} rows of tokens cannot be shared evenly; give another --size")
    image_tokens = max(cut.sizes(rows * cols))
    for path, attention in network.module.named_modules():
        if hasattr(attention, "processor") and hasattr(attention, "to_k"):
            if getattr(attention, "is_cross_attention", False):
                continue  # to text that every rank has
            # SD3.5's second attention of a block sees the image alone, PixArt's first one as well.
            joined = facts.text != "none" and not path.endswith("attn2")
            texts = max(cut.sizes(text)) if joined and facts.sends_text(text, ranks) else 0
            layout = TokenLayout(rows // ranks, cols, network.patch, facts.text) if facts.rows else TokenLayout()
            yield Layer(image_tokens + texts, attention.to_k.out_features, attention.heads, layout, path)
