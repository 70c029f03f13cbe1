"""What the actors of `tests/xdit/test_ray_actors.py` run; they import it by name."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any


class Registrar:
    """An actor that gets at the plugin through its entry point, as an xfuser with this project's patches does."""

    def registered(self, name: str) -> dict[str, bool]:
        """Load and install what the entry point names; return what was there before, and what is then."""
        before = "xfuser" in sys.modules
        (entry,) = entry_points(group="xfuser.parallel_strategies", name=name)
        entry.load().install()
        import xfuser
        from xfuser.model_executor.layers import usp

        return {
            "xfuser before": before,
            "marked": getattr(xfuser, "_otil_xdit_registered", False),
            "attention is hooked": hasattr(usp.ring_attn, "__wrapped__"),
        }


class OnCpu:
    """The pipeline class of xDiT for SD3, whose pipelines stay where they are: `DiTWorker` sends them to "cuda:N"."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str, engine_config: Any, **kwargs: Any) -> SimpleNamespace:
        from xfuser import xFuserStableDiffusion3Pipeline

        pipe = xFuserStableDiffusion3Pipeline.from_pretrained(
            pretrained_model_name_or_path, engine_config=engine_config, **kwargs
        )
        pipe.set_progress_bar_config(disable=True)
        return SimpleNamespace(to=lambda device: pipe)
