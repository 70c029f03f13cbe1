"""Runner models that the plugin adds to xDiT's registry: ``xfuser --model tiny-dit``, and the U-Nets."""

from __future__ import annotations

from typing import Any

import torch

from otil_xdit.catalog.bundled import TINY_DIT, absent_parts, model_folder
from otil_xdit.catalog.folders import dtype_argument
from otil_xdit.catalog.models import find_dit


def register_models() -> None:
    """Add the plugin's models to `MODEL_REGISTRY`; xfuser must be importable."""
    from otil_xdit.xdit.models.pipelines import register_unets
    from otil_xdit.xdit.models.unets import register_unet_models

    register_unets()
    register_unet_models()
    _register_tiny_dit()


def _register_tiny_dit() -> None:
    from xfuser import xFuserStableDiffusion3Pipeline
    from xfuser.model_executor.models.runner_models.base_model import (
        DefaultInputValues,
        DiffusionOutput,
        ModelCapabilities,
        ModelSettings,
        register_model,
        xFuserModel,
    )

    record = find_dit(TINY_DIT)
    assert record is not None, "it is in the catalog"
    defaults = DefaultInputValues(height=record.height, width=record.width, num_inference_steps=28, guidance_scale=4.0)

    @register_model(TINY_DIT)
    class TinyDiT(xFuserModel):
        """The small trained DiT of SD3's architecture that ships with this package."""

        capabilities = ModelCapabilities(
            use_cfg_parallel=True,
            # xDiT gathers data-parallel images from the first rank of a replica, but its SD3 pipeline leaves them on
            # the last one.
            data_parallel_degree=False,
            enable_slicing=True,
            enable_tiling=True,
        )
        default_input_values = defaults
        settings = ModelSettings(
            model_name=model_folder(TINY_DIT),
            output_name=TINY_DIT.replace("-", "_"),
            model_output_type="image",
            resolution_divisor=8,
        )

        def _load_model(self) -> Any:
            return xFuserStableDiffusion3Pipeline.from_pretrained(
                pretrained_model_name_or_path=self.settings.model_name,
                engine_config=self.engine_config,
                **dtype_argument(torch.float32),
                **absent_parts(self.settings.model_name),
            )

        def _validate_args(self, input_args: dict[str, Any]) -> None:
            super()._validate_args(input_args)
            scale = input_args["guidance_scale"]
            if scale is not None and scale <= 1:
                raise ValueError(f"--guidance_scale {scale:g}: xDiT's SD3 pipeline needs guidance; give more than 1")

        def _run_pipe(self, input_args: dict[str, Any]) -> DiffusionOutput:
            output = self.pipe(
                height=input_args["height"],
                width=input_args["width"],
                prompt=input_args["prompt"],
                negative_prompt=input_args["negative_prompt"],
                num_inference_steps=input_args["num_inference_steps"],
                guidance_scale=input_args["guidance_scale"],
                generator=self._make_generator(input_args["seed"]),
            )
            return DiffusionOutput(images=output.images if output else [], pipe_args=input_args)
