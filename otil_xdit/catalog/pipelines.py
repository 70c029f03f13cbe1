"""Which pipelines run on patches: those of diffusers round a U-Net, and those that xDiT wraps but has no runner for."""

from __future__ import annotations

from typing import Any, NamedTuple

from otil_xdit.catalog.record import State


class WrappedPipeline(NamedTuple):
    """A pipeline that xDiT wraps: its class in xfuser, what happens under ``--parallel``, and why."""

    name: str
    state: State
    note: str = ""


WRAPPED_PIPELINES = (
    WrappedPipeline("xFuserPixArtAlphaPipeline", "exact"),
    WrappedPipeline("xFuserPixArtSigmaPipeline", "exact"),
    WrappedPipeline("xFuserHunyuanDiTPipeline", "exact"),
    WrappedPipeline("xFuserCogVideoXPipeline", "exact"),
    WrappedPipeline("xFuserConsisIDPipeline", "exact", "needs cv2"),
    WrappedPipeline("xFuserSanaPipeline", "refused", "its linear attention does not use the ring slot"),
    WrappedPipeline("xFuserLattePipeline", "refused", "wrong under sequence parallelism in xfuser 0.7.0, Ulysses too"),
)
"""Those without a runner, for a script of one's own: see `examples/xdit_args.py`."""

SUPPORTED = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "StableDiffusionAdapterPipeline",
    "StableDiffusionXLAdapterPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionImageVariationPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionXLControlNetUnionPipeline",
    "StableUnCLIPImg2ImgPipeline",
    "KolorsPipeline",
    "KolorsImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
)
"""By the class that diffusers gives them; subclasses of these count as these."""

_PAG = "perturbed-attention guidance replaces attention processors and adds a branch to the batch"

_MAPS = "it reads attention maps of the whole image"

_UNTRIED = "how it calls its U-Net has not been checked"

REFUSED = {
    **dict.fromkeys(
        (
            "StableDiffusionPAGPipeline",
            "StableDiffusionPAGImg2ImgPipeline",
            "StableDiffusionPAGInpaintPipeline",
            "StableDiffusionControlNetPAGPipeline",
            "StableDiffusionControlNetPAGInpaintPipeline",
            "StableDiffusionXLPAGPipeline",
            "StableDiffusionXLPAGImg2ImgPipeline",
            "StableDiffusionXLPAGInpaintPipeline",
            "StableDiffusionXLControlNetPAGPipeline",
            "StableDiffusionXLControlNetPAGImg2ImgPipeline",
            "KolorsPAGPipeline",
        ),
        _PAG,
    ),
    "StableDiffusionSAGPipeline": _MAPS,
    "StableDiffusionAttendAndExcitePipeline": f"{_MAPS} and their gradients",
    "StableDiffusionPix2PixZeroPipeline": f"{_MAPS} and their gradients",
    "LEditsPPPipelineStableDiffusion": _MAPS,
    "LEditsPPPipelineStableDiffusionXL": _MAPS,
    "StableDiffusionGLIGENPipeline": "its gated attention joins tokens for boxes to those of the image",
    "StableDiffusionGLIGENTextImagePipeline": "its gated attention joins tokens for boxes to those of the image",
    "StableDiffusionPanoramaPipeline": "MultiDiffusion calls the U-Net for many overlapping views in one step",
    "StableDiffusionLatentUpscalePipeline": "its U-Net is made of blocks of k-diffusion, which are not cut",
    "StableUnCLIPPipeline": "a prior makes the embedding of an image first, and how it draws has not been checked",
    "MarigoldDepthPipeline": _UNTRIED,
    "MarigoldNormalsPipeline": _UNTRIED,
    "MarigoldIntrinsicsPipeline": _UNTRIED,
    "KandinskyPipeline": "its U-Net is made of other blocks, which are not cut",
    "KandinskyV22Pipeline": "its U-Net is made of other blocks, which are not cut",
    "IFPipeline": "its U-Net works on pixels and is made of other blocks, which are not cut",
    "IFSuperResolutionPipeline": "its U-Net works on pixels and is made of other blocks, which are not cut",
}
"""Pipelines that hold a `UNet2DConditionModel` and do not run on patches, and why; unnamed ones have not been tried."""


def check_unet_pipeline(pipe: Any) -> None:
    """Refuse a pipeline whose U-Net cannot be cut into patches without changing the result.

    Args:
        pipe: a diffusers pipeline with a component ``unet``.

    Raises:
        ValueError: naming the pipeline's class, the reason, and what is supported.
    """
    name, bases = type(pipe).__name__, [base.__name__ for base in type(pipe).__mro__]
    network = type(getattr(pipe.unet, "_orig_mod", pipe.unet))  # torch.compile hides the module in itself
    if "UNet2DConditionModel" not in [base.__name__ for base in network.__mro__]:
        raise ValueError(f"{name} does not run on patches: its unet is {network.__name__}, not UNet2DConditionModel")
    refused = next((REFUSED[base] for base in bases if base in REFUSED), None)
    if refused is None and any(base in SUPPORTED for base in bases):
        return
    raise ValueError(f"{name} does not run on patches: {refused or _UNTRIED}; supported are {', '.join(SUPPORTED)}")
