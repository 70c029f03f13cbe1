"""The nodes: text to image, and image to image. B images, H x W pixels, C colours."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from .client import make_images

PREVIEWS = 6
PREVIEW_SIDE = 512


def _inputs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return what both nodes ask for; 0 leaves sizes, steps and guidance to the server."""
    return {
        "server": ("STRING", {"default": "http://127.0.0.1:8000"}),
        "prompt": ("STRING", {"default": "", "multiline": True}),
        "negative_prompt": ("STRING", {"default": "", "multiline": True}),
        "width": ("INT", {"default": 0, "min": 0, "max": 16384, "step": 8}),
        "height": ("INT", {"default": 0, "min": 0, "max": 16384, "step": 8}),
        "steps": ("INT", {"default": 0, "min": 0, "max": 10000}),
        "guidance": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1000.0, "step": 0.1}),
        "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": True}),
        "images": ("INT", {"default": 1, "min": 1, "max": 1000}),
    }


def _more_inputs() -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        "scheduler": ("STRING", {"default": "", "tooltip": "a sampler of the server; empty for the model's own"}),
        "lora": ("STRING", {"default": "", "tooltip": "NAME or NAME:WEIGHT, of the server's --lora_dir"}),
    }


class XfuserTextToImage:
    """Makes images of a prompt."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"
    CATEGORY = "xfuser"
    DESCRIPTION = "One image on all cards of a server of `xfuser serve`."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs, as ComfyUI wants them."""
        return {"required": _inputs(), "optional": _more_inputs()}

    def make(self, server: str, **values: Any) -> tuple[torch.Tensor]:
        """Return the images, [B, H, W, C] in float32 from 0 to 1."""
        return (_made(server, values, {}),)


class XfuserImageToImage(XfuserTextToImage):
    """Makes images of an image and a prompt; with a mask only where that is 1."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs, as ComfyUI wants them."""
        strength = ("FLOAT", {"default": 0.75, "min": 0.0, "max": 1.0, "step": 0.01})
        required = {"image": ("IMAGE", {}), **_inputs(), "strength": strength}
        return {"required": required, "optional": {"mask": ("MASK", {}), **_more_inputs()}}

    def make(
        self, server: str, image: torch.Tensor, strength: float, mask: torch.Tensor | None = None, **values: Any
    ) -> tuple[torch.Tensor]:
        """Return the images of each image of `image` [B, H, W, C], as [B, H, W, C]; `mask` is [B, H, W]."""
        made = []
        for number, one in enumerate(image):
            files = {"image": _png(one)}
            if mask is not None:
                masks = mask.reshape(-1, *mask.shape[-2:])
                files["mask"] = _png(masks[min(number, len(masks) - 1)])
            made.append(_made(server, {**values, "strength": strength}, files))
        return (torch.cat(made),)


def _made(server: str, values: dict[str, Any], files: dict[str, bytes]) -> torch.Tensor:
    """Return the images of one request, [B, H, W, C]."""
    own = {"prompt": values["prompt"], "seed": values["seed"], "n": values["images"], "partial_images": PREVIEWS}
    given = {
        "negative_prompt": values["negative_prompt"],
        "num_inference_steps": values["steps"],
        "guidance_scale": values["guidance"],
        "scheduler": values.get("scheduler"),
        "lora": values.get("lora"),
    }
    fields = {**own, **{name: value for name, value in given.items() if value}}
    if values["width"] and values["height"]:
        fields["size"] = f"{values['width']}x{values['height']}"
    elif values["width"] or values["height"]:
        raise ValueError("give width and height, or 0 for both")
    if "strength" in values:
        fields["strength"] = values["strength"]
    bar = _Bar()
    return torch.stack([_tensor(file) for file in make_images(server, fields, files, bar.show, bar.check_stopped)])


class _Bar:
    """ComfyUI's progress bar and its stop button; nothing where this runs without ComfyUI."""

    def __init__(self) -> None:
        try:
            from comfy.model_management import throw_exception_if_processing_interrupted
            from comfy.utils import ProgressBar
        except ImportError:
            self.check_stopped, self._bar = lambda: None, None
        else:
            self.check_stopped, self._bar = throw_exception_if_processing_interrupted, ProgressBar(1)

    def show(self, step: int, steps: int, preview: bytes | None) -> None:
        """Move the bar on."""
        if self._bar is not None:
            shown = None if preview is None else ("JPEG", Image.open(io.BytesIO(preview)).convert("RGB"), PREVIEW_SIDE)
            self._bar.update_absolute(step, steps, shown)


def _tensor(file: bytes) -> torch.Tensor:
    """Return an image file as [H, W, C]."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(file)).convert("RGB"), np.float32) / 255.0)


def _png(values: torch.Tensor) -> bytes:
    """Return an image [H, W, C], or a mask [H, W], as a PNG file."""
    file = io.BytesIO()
    numbers = (values.float().cpu().numpy() * 255.0).round().clip(0, 255).astype(np.uint8)
    Image.fromarray(numbers).save(file, "PNG")
    return file.getvalue()


NODE_CLASS_MAPPINGS = {"XfuserTextToImage": XfuserTextToImage, "XfuserImageToImage": XfuserImageToImage}
NODE_DISPLAY_NAME_MAPPINGS = {
    "XfuserTextToImage": "Text to image (xfuser serve)",
    "XfuserImageToImage": "Image to image (xfuser serve)",
}
