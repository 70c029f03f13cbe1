"""xfuser's registry of models, loaded without the many lines that importing xfuser prints."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from otil_xdit.xdit.cpu import enable_cpu_ranks


def model_registry() -> dict[str, Any]:
    """Return xfuser's models by name, with ours among them; the plugin is hooked in."""
    from otil_xdit.xdit.plugin.register import register  # imports diffusers: not before a flag is wrong

    enable_cpu_ranks()
    with _quiet():
        base_model = importlib.import_module("xfuser.model_executor.models.runner_models.base_model")
        register()
    registry: dict[str, Any] = base_model.MODEL_REGISTRY
    return registry


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence log lines and warnings: the ranks will write them again."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
