"""Small U-Nets of every architecture that diffusers' Stable Diffusion pipelines use, and what they are called with."""

from tests.unets.configs import CONFIGS, REAL, build_unet
from tests.unets.pipelines import pipeline_around
from tests.unets.trial import ALTERATIONS, EXTRAS, Trial

__all__ = ["ALTERATIONS", "CONFIGS", "EXTRAS", "REAL", "Trial", "build_unet", "pipeline_around"]
