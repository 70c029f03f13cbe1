"""Image to image and inpainting with the networks of a text-to-image pipeline."""

from __future__ import annotations

import importlib
from inspect import signature
from typing import Any

from otil_xdit.xdit.plugin.sessions import share_session

_EDITING = {
    "StableDiffusionPipeline": {
        "image": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
    },
    "StableDiffusionXLPipeline": {
        "image": "StableDiffusionXLImg2ImgPipeline",
        "inpaint": "StableDiffusionXLInpaintPipeline",
    },
    "LatentConsistencyModelPipeline": {"image": "LatentConsistencyModelImg2ImgPipeline"},
    "FluxPipeline": {"image": "FluxImg2ImgPipeline", "inpaint": "FluxInpaintPipeline"},
    "QwenImagePipeline": {"image": "QwenImageImg2ImgPipeline", "inpaint": "QwenImageInpaintPipeline"},
    "ZImagePipeline": {"image": "ZImageImg2ImgPipeline", "inpaint": "ZImageInpaintPipeline"},
}
"""By the text-to-image pipeline's class: those that edit, by what they start from.

Of DiTs those whose networks cut and join their tokens themselves. Where xDiT wraps the pipeline, as with SD3, the
wrapper's own loop does that, and it starts from noise only.
"""


class EditingPipelines:
    """The pipelines that edit, made when the first image wants them; they hold the same networks.

    Args:
        pipe: text to image, attached to a session where it has one.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        names = {kind.__name__ for kind in type(pipe).__mro__}
        self._classes = next((found for name, found in _EDITING.items() if name in names), {})
        self._made: dict[str, Any] = {}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return what there is: "image", to start from an image; "inpaint", from an image and a mask."""
        return tuple(self._classes)

    def get(self, kind: str) -> Any:
        """Return the pipeline of one of `kinds`."""
        if kind not in self._made:
            edits = getattr(importlib.import_module("diffusers"), self._classes[kind])
            # Not `from_pipe`: a network on patches is of a subclass, which it takes for another network.
            taken, parts = signature(edits.__init__).parameters, self._pipe.components
            parts = {name: part for name, part in parts.items() if name in taken}
            if "requires_safety_checker" in taken:
                parts["requires_safety_checker"] = parts.get("safety_checker") is not None
            made = edits(**parts)
            share_session(self._pipe, made)
            self._made[kind] = made
        return self._made[kind]
