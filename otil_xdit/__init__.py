"""otil-xdit: one image on several ranks of xDiT, sending only the sub-blocks that changed most.

The names below are imported on first use: ``import otil_xdit`` itself needs neither xfuser nor a process group.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from otil_xdit.config import OtilConfig
    from otil_xdit.registry import Strategy, get_strategy, register_strategy, strategies
    from otil_xdit.xdit.api import parallelize, restore
    from otil_xdit.xdit.hooks import register

__version__ = "0.1.0"

_HOMES = {
    "OtilConfig": "otil_xdit.config",
    "Strategy": "otil_xdit.registry",
    "get_strategy": "otil_xdit.registry",
    "parallelize": "otil_xdit.xdit.api",
    "register": "otil_xdit.xdit.hooks",
    "register_strategy": "otil_xdit.registry",
    "restore": "otil_xdit.xdit.api",
    "strategies": "otil_xdit.registry",
}

__all__ = [
    "OtilConfig",
    "Strategy",
    "get_strategy",
    "parallelize",
    "register",
    "register_strategy",
    "restore",
    "strategies",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
