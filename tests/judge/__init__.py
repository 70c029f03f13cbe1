"""diffusers' own pipelines around small U-Nets, in the ways that people use them: what the plugin must not change."""

from tests.judge.adapters import SCENES as ADAPTERS
from tests.judge.calls import SCENES as CALLS
from tests.judge.edits import SCENES as EDITS
from tests.judge.refusals import SCENES as REFUSALS
from tests.judge.scene import Scene

SCENES: dict[str, Scene] = {scene.name: scene for scene in (*CALLS, *EDITS, *ADAPTERS, *REFUSALS)}

__all__ = ["SCENES", "Scene"]
