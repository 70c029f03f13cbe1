"""Small U-Nets of every architecture that diffusers' Stable Diffusion pipelines use, and what they are called with."""

from tests.support.unets.configs import CONFIGS, REAL, build_unet
from tests.support.unets.pipelines import pipeline_around
from tests.support.unets.trial import ALTERATIONS, EXTRAS, Trial

__all__ = ["ALTERATIONS", "CONFIGS", "EXTRAS", "REAL", "Trial", "build_unet", "pipeline_around"]
