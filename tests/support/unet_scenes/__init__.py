"""diffusers' own pipelines around small U-Nets, in the ways that people use them: what the plugin must not change."""

from tests.support.unet_scenes.adapters import SCENES as ADAPTERS
from tests.support.unet_scenes.calls import SCENES as CALLS
from tests.support.unet_scenes.edits import SCENES as EDITS
from tests.support.unet_scenes.others import SCENES as OTHERS
from tests.support.unet_scenes.refusals import SCENES as REFUSALS
from tests.support.unet_scenes.scene import Scene

SCENES: dict[str, Scene] = {scene.name: scene for scene in (*CALLS, *EDITS, *ADAPTERS, *OTHERS, *REFUSALS)}

__all__ = ["SCENES", "Scene"]
