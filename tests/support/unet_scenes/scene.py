"""What a scene of the judge is, and the call that most of them make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

PROMPT = "a large red circle on the left, striped background"
OTHER_PROMPT = "a small blue square on the right, dotted background"
STEPS = 3

LATENTS_TOLERANCE = 1e-4
IMAGES_TOLERANCE = 1e-3
"""Of 0..1: a decoder amplifies what latents differ by."""


@dataclass(frozen=True)
class Scene:
    """Something that people do with a pipeline; done once as diffusers has it and once on several ranks.

    Attributes:
        name: of the scene.
        build: makes the pipeline and does what comes before parallelising it; the same each time.
        run: uses the pipeline, and gives tensors to compare.
        tolerance: the largest absolute difference of them.
        refused: what the message of the `ValueError` contains which the parallel pipeline must raise instead.
    """

    name: str
    build: Callable[[], Any]
    run: Callable[[Any], list[torch.Tensor]]
    tolerance: float = LATENTS_TOLERANCE
    refused: str = ""


def images(pipe: Any, **call: Any) -> torch.Tensor:
    """The latents, or with another `output_type` the images, that one call of `pipe` gives."""
    usual = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    if "generator" not in call:
        usual["generator"] = torch.Generator().manual_seed(7)
    made = pipe(**{**usual, **call}).images
    return made if isinstance(made, torch.Tensor) else torch.as_tensor(made)


def calling(**call: Any) -> Callable[[Any], list[torch.Tensor]]:
    """A `run` of one call with these arguments; an argument that is a function is called to make its value."""

    def run(pipe: Any) -> list[torch.Tensor]:
        made = {name: value() if name in MADE_ANEW else value for name, value in call.items()}
        return [images(pipe, **made)]

    return run


MADE_ANEW = frozenset({"generator"})
"""Arguments that a call uses up, so that each call needs its own."""
