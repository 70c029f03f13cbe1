"""otil-xdit: one image on several ranks of xDiT, sending only the sub-blocks that changed most.

The names below are imported on first use: ``import otil_xdit`` itself needs neither xfuser nor a process group.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from otil_xdit.method.config import OtilConfig
    from otil_xdit.runtime.strategies import Strategy, get_strategy, register_strategy, strategies
    from otil_xdit.xdit.api import parallelize, restore
    from otil_xdit.xdit.plugin.register import register

__version__ = "0.1.0"

_HOMES = {
    "OtilConfig": "otil_xdit.method.config",
    "Strategy": "otil_xdit.runtime.strategies",
    "get_strategy": "otil_xdit.runtime.strategies",
    "parallelize": "otil_xdit.xdit.api",
    "register": "otil_xdit.xdit.plugin.register",
    "register_strategy": "otil_xdit.runtime.strategies",
    "restore": "otil_xdit.xdit.api",
    "strategies": "otil_xdit.runtime.strategies",
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
