"""otil-xdit: one image on several ranks of xDiT, sending only the sub-blocks that changed most.

The names below are imported on first use: ``import otil_xdit`` itself needs neither xfuser nor a process group.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from otil_xdit.errors import ExchangeTimeout, FlagError, NotFinite, NotInStages, PipelineBusyError
    from otil_xdit.exchange.report import Report
    from otil_xdit.method.config import OtilConfig
    from otil_xdit.runtime.strategies import Strategy, get_strategy, register_strategy, strategies
    from otil_xdit.xdit.api import parallelize, restore
    from otil_xdit.xdit.generation import generation
    from otil_xdit.xdit.plugin.register import register
    from otil_xdit.xdit.summary import report, summary

__version__ = "0.1.0"

_HOMES = {
    "ExchangeTimeout": "otil_xdit.errors",
    "FlagError": "otil_xdit.errors",
    "NotFinite": "otil_xdit.errors",
    "NotInStages": "otil_xdit.errors",
    "PipelineBusyError": "otil_xdit.errors",
    "OtilConfig": "otil_xdit.method.config",
    "Report": "otil_xdit.exchange.report",
    "Strategy": "otil_xdit.runtime.strategies",
    "generation": "otil_xdit.xdit.generation",
    "get_strategy": "otil_xdit.runtime.strategies",
    "parallelize": "otil_xdit.xdit.api",
    "register": "otil_xdit.xdit.plugin.register",
    "register_strategy": "otil_xdit.runtime.strategies",
    "report": "otil_xdit.xdit.summary",
    "restore": "otil_xdit.xdit.api",
    "strategies": "otil_xdit.runtime.strategies",
    "summary": "otil_xdit.xdit.summary",
}

__all__ = [
    "ExchangeTimeout",
    "FlagError",
    "NotFinite",
    "NotInStages",
    "OtilConfig",
    "PipelineBusyError",
    "Report",
    "Strategy",
    "generation",
    "get_strategy",
    "parallelize",
    "register",
    "register_strategy",
    "report",
    "restore",
    "strategies",
    "summary",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use.

    Raises:
        AttributeError: for any other name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
