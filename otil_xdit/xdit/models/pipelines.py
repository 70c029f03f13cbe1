"""Which diffusers pipelines around `UNet2DConditionModel` run on patches, and their place in xDiT.

xDiT has a pipeline wrapper for SDXL and a runtime state for U-Nets that allow two ranks with CFG and nothing else. Here
a pipeline is not wrapped but attached in place (`otil_xdit.xdit.plugin.sessions`), on any number of ranks, and every
rank gets the images. `register_unets` makes xDiT's own ways of getting there lead to that: its registry of pipeline
wrappers, `xFuserStableDiffusionXLPipeline`, and `UnetRuntimeState`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from otil_xdit.catalog.pipelines import SUPPORTED, check_unet_pipeline


def register_unets() -> None:
    """Let xDiT's registry of pipeline wrappers and its runtime state take U-Nets on any ranks.

    xfuser must be importable. Calling it again changes nothing.
    """
    import diffusers
    from xfuser import xFuserStableDiffusionXLPipeline
    from xfuser.core.distributed.runtime_state import UnetRuntimeState
    from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister

    wrapper = wrapper_class()
    for name in SUPPORTED:
        xFuserPipelineWrapperRegister.register(getattr(diffusers, name))(wrapper)
    # Scripts that import xDiT's class by name construct it as before, and get no second CFG split over ours.
    for method in ("__init__", "__call__", "prepare_run"):
        setattr(xFuserStableDiffusionXLPipeline, method, getattr(wrapper, method))
    UnetRuntimeState.sanity_check = _check_runtime_state


@cache
def wrapper_class() -> Any:
    """`xFuserUNetPipeline`, made when xfuser may be imported."""
    import torch
    from diffusers import DiffusionPipeline
    from xfuser.envs import get_device_name
    from xfuser.model_executor.base_wrapper import xFuserBaseWrapper
    from xfuser.model_executor.pipelines.base_pipeline import xFuserPipelineBaseWrapper

    class xFuserUNetPipeline(xFuserPipelineBaseWrapper):
        """xDiT's way of holding a pipeline, for scripts that are written so; the pipeline itself does the work.

        Args:
            pipeline: one of `SUPPORTED`; it is changed in place.
            engine_config: what `xFuserArgs.create_config` gives.

        Raises:
            ValueError: for a pipeline or a setting that does not work.
        """

        def __init__(self, pipeline: Any, engine_config: Any) -> None:
            check_unet_pipeline(pipeline)
            self.engine_config = engine_config
            self._init_runtime_state(pipeline=pipeline, engine_config=engine_config)
            if engine_config.runtime_config.use_parallel_vae and engine_config.parallel_config.world_size > 1:
                pipeline.vae = self._convert_vae(pipeline.vae)
            # Not xDiT's own __init__, which converts schedulers and transformers: here nothing is converted.
            xFuserBaseWrapper.__init__(self, module=pipeline)

        @classmethod
        def from_pretrained(
            cls, name: str, engine_config: Any, return_org_pipeline: bool = False, **kwargs: Any
        ) -> Any:
            """Load a diffusers pipeline and wrap it; `kwargs` are those of `DiffusionPipeline.from_pretrained`."""
            pipeline = DiffusionPipeline.from_pretrained(name, **kwargs)
            return pipeline if return_org_pipeline else cls(pipeline, engine_config)

        @xFuserPipelineBaseWrapper.enable_data_parallel
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

        def prepare_run(self, input_config: Any, steps: int = 3, sync_steps: int = 1) -> None:
            """A short generation, so that the first one that counts does not pay for allocations."""
            self(
                prompt=[""] * (input_config.batch_size or 1),
                height=input_config.height,
                width=input_config.width,
                num_inference_steps=steps,
                generator=torch.Generator(get_device_name()).manual_seed(42),
                output_type="latent",
            )

    return xFuserUNetPipeline


def _check_runtime_state(state: Any) -> None:
    """In place of `UnetRuntimeState.sanity_check`: what patches of a U-Net do not compose with.

    Raises:
        ValueError: naming the degree.
    """
    parallel = state.parallel_config
    limits = (
        ("pipefusion_parallel_degree", parallel.pp_degree, 1, "PipeFusion is for transformers"),
        ("tensor_parallel_degree", parallel.tp_degree, 1, "its layers are not cut by channels"),
        ("vae_parallel_size", parallel.vae_parallel_size, 0, "set use_parallel_vae instead"),
    )
    for name, value, most, reason in limits:
        if value > most:
            raise ValueError(f"{name} is {value}, which a U-Net does not support ({reason}); give {most}")
