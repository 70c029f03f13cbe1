"""Equivalent networks draw the same image in one process, though their keys and values are others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from otil_xdit.catalog.bundled import model_folder
from otil_xdit.catalog.folders import OWN, load_pipe
from otil_xdit.tools.eval.equivalents import CHANGES, parse_equivalent
from tests.support.dits.packed import build_flux, flux_embeds

ROUNDING = 5e-4
"""Images are in 0..1, latents have unit scale. One call in float64 differs by 5e-13; float32 leaves up to 1.3e-4."""

TEXTS = ("log-normal:1.5", "outliers:30", "heads:30", "rotated:1", "reordered:3")


def shipped(name: str) -> tuple[Any, Callable[[], torch.Tensor]]:
    """The network of a bundled model, and what draws an image with it."""
    pipe = load_pipe(model_folder(name), OWN, None)

    def draw() -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        call = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt", "generator": noise}
        return pipe("a small red circle", guidance_scale=4.0, **call).images[0]

    return getattr(pipe, "unet", None) or pipe.transformer, draw


def flux() -> tuple[Any, Callable[[], torch.Tensor]]:
    pipe = build_flux()
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}

    def draw() -> torch.Tensor:
        return pipe(generator=torch.Generator().manual_seed(0), **call, **flux_embeds()).images[0]

    return pipe.transformer, draw


def first_outputs(network: Any, name: str, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What the first layer of that name returns when an image is drawn."""
    seen: list[torch.Tensor] = []
    layer = next(
        module
        for path, module in network.named_modules()
        if path.endswith(name) and "attn2" not in path and module is not None
    )
    hook = layer.register_forward_hook(lambda module, args, out: seen.append(out))
    draw()
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl", "tiny-dit", "flux"])
def test_same_image_from_other_keys_and_values(name: str) -> None:
    for text in TEXTS:
        network, draw = flux() if name == "flux" else shipped(name)
        image = draw()
        normed = name in ("tiny-dit", "flux")
        layers = ("norm_k" if normed else "to_k", "to_v")
        before = [first_outputs(network, layer, draw) for layer in layers]
        parse_equivalent(text).apply(network, seed=1)
        torch.testing.assert_close(draw(), image, rtol=0, atol=ROUNDING)
        for layer, old in zip(layers, before, strict=True):
            if text.startswith(("heads", "reordered")) and layer == "norm_k":
                continue  # its weight is the same for all heads, and keeps its order
            changed = (first_outputs(network, layer, draw) - old).norm() / old.norm()
            assert changed > 0.3, f"{text} leaves {layer} as it is: the line above shows nothing"


@pytest.mark.parametrize("text", ["cubes:3", "outliers", "heads:0", "log-normal:-1", "rotated:nan"])
def test_refusals_say_what_is_accepted(text: str) -> None:
    with pytest.raises(ValueError, match=f"--variant {text}: .*(choose from {', '.join(CHANGES)}|give a positive)"):
        parse_equivalent(text)


def test_refuses_a_network_without_attention() -> None:
    with pytest.raises(ValueError, match="Linear has no self-attention"):
        parse_equivalent("heads:2").apply(torch.nn.Linear(2, 2))
