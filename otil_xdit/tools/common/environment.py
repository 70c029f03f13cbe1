"""Where, and with which versions, figures were made."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from otil_xdit import __version__
from otil_xdit.runtime.versions import package_versions


def versions() -> dict[str, str]:
    """Return the versions of everything that the figures may depend on."""
    own = {"otil-xdit": __version__, "python": platform.python_version()}
    return own | package_versions("xfuser", "diffusers", "torch", "torchmetrics")


def machine() -> dict[str, Any]:
    """Return cores, processor, and how ranks are pinned to cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cpu = next(names, platform.processor() or platform.machine())
    return {"cores": cores, "cpu": cpu, "pinned": f"rank r to core r mod {cores}, 1 thread"}
